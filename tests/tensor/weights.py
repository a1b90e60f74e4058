"""AQLM weights for tests of the tensor."""

import torch
from torch import nn

from aqlm_tensor.scheme import AQLMScheme
from aqlm_tensor.tensor import AQLMTensor
from tests.strategies import random_parts

__all__ = ["as_aqlm", "random_weight", "weight_of"]


def random_weight(
    scheme: str | AQLMScheme = "2x8g8",
    out_features: int = 32,
    in_features: int = 64,
    *,
    experts: int = 0,
    partitions: int = 0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> AQLMTensor:
    """A Gaussian weight [O, I], or a stack [E, O, I] if there are experts."""
    each = [
        random_parts(scheme, out_features, in_features, dtype=dtype, partitions=partitions, seed=seed + expert)
        for expert in range(max(1, experts))
    ]
    if not experts:
        return AQLMTensor(*each[0])
    codes, codebooks, scales = (torch.stack(parts) for parts in zip(*each, strict=True))
    return AQLMTensor(codes, codebooks, scales)


def as_aqlm(tensor: object) -> AQLMTensor:
    """The argument, which must be an AQLMTensor."""
    assert isinstance(tensor, AQLMTensor), type(tensor)
    return tensor


def weight_of(module: object) -> AQLMTensor:
    """The AQLM weight of an nn.Linear."""
    assert isinstance(module, nn.Linear)
    return as_aqlm(module.weight)
