"""Plain torch: the specification of every op, right for every scheme, dtype and device, and slow.

It decodes a block of weight rows at a time, so no dense copy of a large weight ever exists. Every other kernel is held
to the same contract; this one also serves where no faster kernel exists.

Sums are formed in float64 where the device has it. A BLAS adds in an order that depends on the number of threads, and
may use TF32 or bfloat16 for float32 matrices if the user allowed that elsewhere; the contract permits neither, and
rounding a float64 sum once hides the first (but for one element in some hundred millions) and excludes the second.

Shapes: O out_features, I in_features, H out_group_size, G in_group_size, K codebooks of C entries, P partitions,
M rows of the dense operand.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from aqlm_tensor.codes import codes_to_indices
from aqlm_tensor.kernels.registry import Problem

__all__ = [
    "dequantize",
    "dequantize_param_grad",
    "linear",
    "linear_input_grad",
    "linear_param_grad",
    "partitioned",
    "supports",
]

_BLOCK_ELEMENTS = 1 << 20  # decoded weights held at a time: 8 MB of float64


def _wide_dtype(device: torch.device) -> torch.dtype:
    return torch.float64 if device.type in ("cpu", "cuda", "meta") else torch.float32


def _wide(tensor: Tensor) -> Tensor:
    """The tensor in the dtype in which sums are formed."""
    return tensor.to(_wide_dtype(tensor.device))


def supports(problem: Problem) -> str | None:
    """None: the reference runs everything."""
    return None


def linear(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """x [M, I] times the transposed weight plus bias [O]: [M, O] in x's dtype, each element rounded once."""
    out_features = codes.shape[0] * codebooks.shape[-2]
    wide = _wide(x)
    y = wide.new_empty(x.shape[0], out_features)
    for rows, weight in _decoded_blocks(codes, codebooks, scales):
        y[:, rows] = wide @ weight.T
    if bias is not None:
        y += _wide(bias)
    return y.to(x.dtype)


def linear_input_grad(grad: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    """Grad [M, O] times the weight: [M, I] in grad's dtype, each element rounded once."""
    in_features = codes.shape[1] * codebooks.shape[-1]
    wide = _wide(grad)
    out = wide.new_zeros(grad.shape[0], in_features)
    for rows, weight in _decoded_blocks(codes, codebooks, scales):
        out.addmm_(wide[:, rows], weight)
    return out.to(grad.dtype)


def dequantize(codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    """The dense weight [O, I] in the codebooks' dtype, each element rounded once."""
    shape = (codes.shape[0] * codebooks.shape[-2], codes.shape[1] * codebooks.shape[-1])
    out = codebooks.new_empty(shape)
    for rows, weight in _decoded_blocks(codes, codebooks, scales):
        out[rows] = weight.to(out.dtype)
    return out


def dequantize_param_grad(
    grad_weight: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients to codebooks and scales, in their shapes and dtypes, of a gradient [O, I] to the dense weight."""

    def blocks() -> Iterator[tuple[slice, Tensor]]:
        yield slice(0, grad_weight.shape[0]), _wide(grad_weight)

    return _param_grad(blocks(), codes, codebooks, scales)


def linear_param_grad(
    x: Tensor, grad: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients to codebooks and scales of `linear`, from x [M, I] and the output's gradient [M, O].

    The dense weight's gradient grad^T x is formed for a block of rows at a time and never as a whole.
    """
    wide_x, wide_grad = _wide(x), _wide(grad)

    def blocks() -> Iterator[tuple[slice, Tensor]]:
        for rows in _row_blocks(codes, codebooks):
            yield rows, wide_grad[:, rows].T @ wide_x

    return _param_grad(blocks(), codes, codebooks, scales)


def partitioned(codebooks: Tensor) -> Tensor:
    """Codebooks as [P, K, C, H, G]."""
    return codebooks if codebooks.dim() == 5 else codebooks.unsqueeze(0)


def _row_blocks(codes: Tensor, codebooks: Tensor) -> Iterator[slice]:
    """Slices of weight rows (multiples of H, none across a partition border) of about _BLOCK_ELEMENTS weights."""
    books = partitioned(codebooks)
    out_group, in_group = books.shape[-2:]
    groups = codes.shape[0] // books.shape[0]
    step = max(1, _BLOCK_ELEMENTS // max(1, out_group * codes.shape[1] * in_group))
    for partition in range(books.shape[0]):
        for start in range(partition * groups, (partition + 1) * groups, step):
            stop = min(start + step, (partition + 1) * groups)
            yield slice(start * out_group, stop * out_group)


def _decoded_blocks(codes: Tensor, codebooks: Tensor, scales: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(rows, weight rows [R, I], wide) covering the weight once, in order."""
    out_group = codebooks.shape[-2]
    for rows in _row_blocks(codes, codebooks):
        groups = slice(rows.start // out_group, rows.stop // out_group)
        unscaled, _ = _decode(codes[groups], _books_of(groups, codes, codebooks))
        yield rows, _to_rows(unscaled * _wide(scales[groups]))


def _books_of(groups: slice, codes: Tensor, codebooks: Tensor) -> Tensor:
    """The codebooks [K, C, H, G], wide, of the partition that a block of out groups lies in."""
    books = partitioned(codebooks)
    return _wide(books[groups.start * books.shape[0] // codes.shape[0]])


def _decode(codes: Tensor, books: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of entries [R, I/G, H, G] in the dtype of the books, and the indices [R, I/G, K] they came from."""
    num_codebooks, size, out_group, in_group = books.shape
    indices = codes_to_indices(codes, (size - 1).bit_length())
    total = books.new_zeros(*codes.shape[:2], out_group * in_group)
    for k in range(num_codebooks):
        total += F.embedding(indices[..., k], books[k].flatten(1))
    return total.unflatten(-1, (out_group, in_group)), indices


def _to_rows(tiles: Tensor) -> Tensor:
    """Tiles [R, I/G, H, G] as weight rows [R * H, I]."""
    groups, in_groups, out_group, in_group = tiles.shape
    return tiles.transpose(1, 2).reshape(groups * out_group, in_groups * in_group)


def _to_tiles(rows: Tensor, out_group: int, in_group: int) -> Tensor:
    """Weight rows [R * H, I] as tiles [R, I/G, H, G]."""
    return rows.unflatten(0, (-1, out_group)).unflatten(2, (-1, in_group)).transpose(1, 2)


def _param_grad(
    grad_blocks: Iterator[tuple[slice, Tensor]], codes: Tensor, codebooks: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    """Scatter blocks of the dense weight's gradient to the entries and scales that produced them."""
    books = partitioned(codebooks)
    out_group, in_group = books.shape[-2:]
    grad_books = torch.zeros_like(books, dtype=_wide_dtype(books.device))
    grad_scales = torch.zeros_like(scales, dtype=grad_books.dtype)
    for rows, grad_weight in grad_blocks:
        for groups in _within_partitions(rows, codes, books):
            first = groups.start * out_group - rows.start
            grad = _to_tiles(grad_weight[first : first + (groups.stop - groups.start) * out_group], out_group, in_group)
            partition = groups.start * books.shape[0] // codes.shape[0]
            unscaled, indices = _decode(codes[groups], _wide(books[partition]))
            grad_scales[groups] = (grad * unscaled).sum((1, 2, 3), keepdim=True)
            to_entries = (grad * _wide(scales[groups])).reshape(-1, out_group * in_group)
            for k in range(books.shape[1]):
                # the backward of an embedding lookup: a scatter-add whose order is fixed on CPU and GPU
                scattered = torch.ops.aten.embedding_dense_backward(
                    to_entries, indices[..., k].reshape(-1), books.shape[2], -1, False
                )
                grad_books[partition, k] += scattered.unflatten(-1, (out_group, in_group))
    return grad_books.view_as(codebooks).to(codebooks.dtype), grad_scales.to(scales.dtype)


def _within_partitions(rows: slice, codes: Tensor, books: Tensor) -> Iterator[slice]:
    """The out groups of a block of rows, cut at partition borders."""
    out_group = books.shape[-2]
    per_partition = max(1, codes.shape[0] // books.shape[0])
    start, stop = rows.start // out_group, rows.stop // out_group
    while start < stop:
        border = min(stop, (start // per_partition + 1) * per_partition)
        yield slice(start, border)
        start = border
