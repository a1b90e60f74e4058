"""Random layers drawn on a GPU, and the float64 reference for them; for weights too large for the CPU's strategies."""

import torch

from aqlm_tensor.codes import codes_to_indices
from aqlm_tensor.scheme import AQLMScheme

__all__ = ["ERRORS", "dense", "product", "random_layer", "relative_error"]

ERRORS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}  # of ||y - ref|| / ||ref||, by dtype

Layer = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def random_layer(scheme: str, in_features: int, out_features: int, rows: int, dtype: torch.dtype) -> Layer:
    """codes, codebooks, scales, bias and x."""
    parsed = AQLMScheme.parse(scheme)
    limits = torch.iinfo(parsed.codes_dtype)
    shape = parsed.codes_shape(out_features, in_features)
    codes = torch.randint(limits.min, limits.max + 1, shape, dtype=parsed.codes_dtype, device="cuda")
    codebooks = torch.randn(parsed.codebooks_shape, device="cuda").to(dtype)
    scales = torch.rand(shape[0], 1, 1, 1, device="cuda").add(0.5).to(dtype)
    bias = torch.randn(out_features, device="cuda").to(dtype)
    return codes, codebooks, scales, bias, torch.randn(rows, in_features, device="cuda").to(dtype)


def dense(codes: torch.Tensor, codebooks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The weight in float64, of a scheme without out groups and partitions."""
    books, size, _, group = codebooks.shape
    indices = codes_to_indices(codes, size.bit_length() - 1)
    weight = torch.zeros(*codes.shape[:2], group, dtype=torch.float64, device=codes.device)
    for c in range(books):
        weight += codebooks[c, indices[..., c], 0].double()
    return weight.flatten(1) * scales.double().view(-1, 1)


def product(x: torch.Tensor, codes: torch.Tensor, codebooks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """x @ W.T in float64, some rows of W at a time: several processes share the GPU's memory."""
    parts = zip(codes.split(4096), scales.split(4096), strict=True)
    return torch.cat([x.double() @ dense(some, codebooks, scale).T for some, scale in parts], 1)


def relative_error(y: torch.Tensor, reference: torch.Tensor) -> float:
    return float((y.double() - reference).norm() / reference.norm())
