"""What the kernels of this library are compared with on an NVIDIA GPU.

- The official inference library (aqlm 1.1.7): its kernel for few rows of x, and its path that decodes the weight for
  cuBLAS. It compiles CUDA C++ when it is first used and needs nvcc, ninja and a C++ compiler for that.
- PyTorch's own 4-bit weight-only product, groups of 128 with a scale and a zero each: twice the bits, and another
  accuracy. bfloat16 only.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Int4Weight", "Parts", "Provided", "int4_weights", "official", "pytorch_int4"]

Parts = tuple[Tensor, Tensor, Tensor]

_OFFICIAL = {"1x8g8": "code1x8", "2x8g8": "code2x8", "1x16g8": "code1x16", "1x16g16": "code1x16"}
_OFFICIAL_GEMV_ROWS = 64  # it runs row by row: beyond, only its other path is of interest
_INT4_GROUP = 128
_INT4_ROWS = 128  # it takes 25 times as long as cuBLAS at 2048


@dataclass(frozen=True)
class Provided:
    """A candidate.

    Attributes:
        call: the product with the weight of an index.
        copies: how many weights there are.
        weight: what the first one stands for: a dense weight, or the parts of a quantized one.
    """

    call: Callable[[int], Tensor]
    copies: int
    weight: "Tensor | Parts"
    stored_bytes: int = 0

    @property
    def nbytes(self) -> int:
        """Memory that one weight takes as it is stored."""
        if self.stored_bytes:
            return self.stored_bytes
        return self.weight.nbytes if isinstance(self.weight, Tensor) else sum(part.nbytes for part in self.weight)


def official(parts: Sequence[Parts], x: Tensor) -> dict[str, Provided]:
    """Both paths of aqlm 1.1.7, where it is installed and has kernels for the scheme."""
    codebooks = parts[0][1]
    books, size, _, group = codebooks.shape
    name = _OFFICIAL.get(f"{books}x{size.bit_length() - 1}g{group}")
    if name is None or importlib.util.find_spec("aqlm") is None:
        return {}
    from aqlm.inference_kernels.cuda_kernel import CUDA_FOLDER  # noqa: F401 - importing it builds and registers the ops

    ops: Any = torch.ops.aqlm
    paths = {"official decode + cuBLAS": getattr(ops, f"{name}_matmat_dequant")}
    if x.shape[0] <= _OFFICIAL_GEMV_ROWS:
        paths["official gemv"] = getattr(ops, f"{name}_matmat")
    return {path: Provided(lambda i, op=op: op(x, *parts[i], None), len(parts), parts[0]) for path, op in paths.items()}


@dataclass(frozen=True)
class Int4Weight:
    """A weight in PyTorch's packed 4-bit layout, its scales and zeros, and the dense weight it stands for."""

    packed: Tensor
    scales_and_zeros: Tensor
    dense: Tensor


def int4_weights(weights: Sequence[Tensor]) -> list[Int4Weight]:
    """Random 4-bit weights of the shapes of these [O, I], four times as many; none but for bfloat16."""
    if weights[0].dtype != torch.bfloat16:
        return []
    return [_int4(*weights[0].shape) for _ in range(4 * len(weights))]


def _int4(out: int, inner: int) -> Int4Weight:
    values = torch.randint(0, 16, (out, inner), dtype=torch.uint8, device="cuda")
    scales = torch.rand(inner // _INT4_GROUP, out, 2, device="cuda", dtype=torch.bfloat16)
    packed = torch.ops.aten._convert_weight_to_int4pack(values[:, ::2] << 4 | values[:, 1::2], 8)
    scale, zero = (scales[..., i].T.repeat_interleave(_INT4_GROUP, 1).float() for i in (0, 1))
    return Int4Weight(packed, scales, ((values.float() - 8) * scale + zero).bfloat16())


def pytorch_int4(weights: Sequence[Int4Weight], x: Tensor) -> dict[str, Provided]:
    """torch.ops.aten._weight_int4pack_mm."""
    if not weights or x.shape[0] > _INT4_ROWS:
        return {}

    def call(i: int) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm(x, weights[i].packed, _INT4_GROUP, weights[i].scales_and_zeros)

    stored = weights[0].packed.nbytes + weights[0].scales_and_zeros.nbytes
    return {"PyTorch int4": Provided(call, len(weights), weights[0].dense, stored)}
