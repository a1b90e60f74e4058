"""Products with a weight that is decoded a piece at a time, into one workspace, for cuBLAS to multiply.

Beyond some hundred tokens a product is bound by arithmetic, which cuBLAS does well, and `grad @ W` reads decoded rows
as they are. Each kernel that can decode brings its `decode_into(out, codes, codebooks, scales)`, which writes the
weight of codes [R, I/G, K] with codebooks [P, K, 2^N, H, G] into a contiguous [R H, I].
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from aqlm_tensor.kernels.reference import partitioned

__all__ = ["WORKSPACE_BYTES", "dequantize", "linear", "linear_input_grad"]

WORKSPACE_BYTES = 128 << 20

DecodeInto = Callable[[Tensor, Tensor, Tensor, Tensor], None]


def dequantize(codes: Tensor, codebooks: Tensor, scales: Tensor, decode_into: DecodeInto) -> Tensor:
    """The weight [O, I] in the codebooks' dtype."""
    out = codebooks.new_empty(codes.shape[0] * codebooks.shape[-2], codes.shape[1] * codebooks.shape[-1])
    if out.numel():
        decode_into(out, codes, partitioned(codebooks), scales)
    return out


def linear(
    x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None, decode_into: DecodeInto
) -> Tensor:
    """``x @ W.t() + bias``: x [M, I] to [M, O]."""
    out = x.new_empty(x.shape[0], codes.shape[0] * codebooks.shape[-2])
    for rows, weight in _decoded(codes, codebooks, scales, decode_into):
        if weight.shape[0] == out.shape[1]:
            return F.linear(x, weight, bias)
        out[:, rows] = F.linear(x, weight, None if bias is None else bias[rows])
    return out


def linear_input_grad(
    grad: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, decode_into: DecodeInto
) -> Tensor:
    """``grad @ W``, pieces added in float32 in their order: grad [M, O] to [M, I]."""
    total = grad.new_zeros(grad.shape[0], codes.shape[1] * codebooks.shape[-1], dtype=torch.float32)
    for rows, weight in _decoded(codes, codebooks, scales, decode_into):
        if weight.shape[0] == grad.shape[1]:
            return grad @ weight
        # float32 out of cuBLAS exists on GPUs only; elsewhere the piece is widened
        if grad.dtype == torch.float32 or grad.device.type != "cuda":
            total += grad[:, rows].float() @ weight.float()
        else:
            total += torch.mm(grad[:, rows], weight, out_dtype=torch.float32)
    return total.to(grad.dtype)


def _decoded(
    codes: Tensor, codebooks: Tensor, scales: Tensor, decode_into: DecodeInto
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the weight and what is decoded of them, one piece after another in the same workspace.

    A piece is a stretch of one partition or, if the whole weight fits the workspace, everything.
    """
    books = partitioned(codebooks)
    out_group, in_features = books.shape[-2], codes.shape[1] * books.shape[-1]
    groups = codes.shape[0]
    size = groups // books.shape[0]
    most = max(1, WORKSPACE_BYTES // max(1, out_group * in_features * books.element_size()))
    if groups <= most:
        yield slice(0, groups * out_group), dequantize(codes, codebooks, scales, decode_into)
        return
    step = min(most, size)
    workspace = books.new_empty(step * out_group, in_features)
    for partition in range(books.shape[0]):
        end = (partition + 1) * size
        for first in range(partition * size, end, step):
            some = slice(first, min(first + step, end))
            weight = workspace[: (some.stop - first) * out_group]
            if weight.numel():
                decode_into(weight, codes[some], books[partition : partition + 1], scales[some])
            yield slice(first * out_group, some.stop * out_group), weight
