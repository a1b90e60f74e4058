"""Sums of vectors by code, the adjoint of looking codebook entries up."""

from typing import Protocol

import torch
from torch import Tensor

from aqlm_tensor.quantizer.parallel import compiled_search

__all__ = ["CodeSums", "code_sums"]


class CodeSums(Protocol):
    """Sums over the places [R, J] that have the same code in a codebook; results do not vary between runs."""

    def __call__(self, values: Tensor) -> Tensor:
        """Sums [K, size, E] of `values` [R * J, E]."""
        ...

    def weighted(self, weights: Tensor, blocks: Tensor) -> Tensor:
        """Sums [K, size, E] of weights[r] * blocks[j]: `weights` [R], `blocks` [J, E]."""
        ...


def code_sums(codes: Tensor, size: int) -> CodeSums:
    """The sums by `codes` [R, J, K] int64, below `size`. What can be prepared is prepared once."""
    backend = compiled_search(codes.device)
    return _TorchSums(codes, size) if backend is None else backend.CodeSums(codes, size)


class _TorchSums:
    def __init__(self, codes: Tensor, size: int) -> None:
        self.codes, self.size = codes.flatten(0, 1).T, size

    def __call__(self, values: Tensor) -> Tensor:
        out = torch.zeros(len(self.codes), self.size, values.shape[1], dtype=values.dtype, device=values.device)
        for sums, codes in zip(out, self.codes, strict=True):
            if values.device.type == "cpu":
                sums.index_add_(0, codes, values)
            else:
                sums.index_put_((codes,), values, accumulate=True)  # sorts, where index_add_ uses atomics
        return out

    def weighted(self, weights: Tensor, blocks: Tensor) -> Tensor:
        return self((weights[:, None, None] * blocks).flatten(0, 1))
