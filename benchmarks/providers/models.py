"""What the linear layers of a language model on a GPU can be replaced by."""

import importlib.util
from typing import Any

import torch
from torch import nn

from aqlm_tensor import AQLMScheme, AQLMTensor, fuse_, unfuse_
from aqlm_tensor.linear import set_quantized

__all__ = ["CANDIDATES", "convert", "random_weight"]

# name: (provider, scheme, whether fused)
CANDIDATES = {
    "dense": ("dense", "", False),
    "official 2x8g8": ("official", "2x8g8", False),
    "2x8g8": ("ours", "2x8g8", False),
    "2x8g8, fused": ("ours", "2x8g8", True),
    "1x16g8": ("ours", "1x16g8", False),
    "1x16g8, fused": ("ours", "1x16g8", True),
}


def random_weight(scheme: AQLMScheme, out_features: int, in_features: int) -> AQLMTensor:
    """Random codes whose weight has about the size that layers have; bfloat16, on the GPU."""
    info = torch.iinfo(scheme.codes_dtype)
    shape = scheme.codes_shape(out_features, in_features)
    codes = torch.randint(info.min, info.max + 1, shape, dtype=scheme.codes_dtype, device="cuda")
    spread = 0.02 / scheme.num_codebooks**0.5
    books = torch.randn(scheme.codebooks_shape, device="cuda") * spread
    return AQLMTensor(codes, books.bfloat16(), torch.ones(shape[0], 1, 1, 1, device="cuda", dtype=torch.bfloat16))


def convert(model: Any, candidate: str) -> str | None:
    """Make the linear layers of a model's blocks what a candidate says; the reason why not if that is impossible."""
    provider, scheme, fused = CANDIDATES[candidate]
    if provider == "official" and importlib.util.find_spec("aqlm") is None:
        return "the package aqlm is not installed"
    if provider == "dense":
        return None if not hasattr(model, "_converted") else "dense must come first"
    model._converted = True
    unfuse_(model)
    for block in model.model.layers:
        for parent in list(block.modules()):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, nn.Linear) or type(layer).__name__ == "QuantizedLinear":
                    setattr(parent, name, _layer(provider, AQLMScheme.parse(scheme), layer))
    if fused:
        fuse_(model)
    return None


def _layer(provider: str, scheme: AQLMScheme, layer: nn.Module) -> nn.Module:
    inner, out = int(layer.in_features), int(layer.out_features)  # pyright: ignore[reportArgumentType]
    weight = random_weight(scheme, out, inner)
    if provider == "ours":
        linear = nn.Linear(inner, out, bias=False, device="meta")
        set_quantized([linear], weight)
        return linear
    from aqlm import QuantizedLinear

    linear = QuantizedLinear(
        inner,
        out,
        in_group_size=scheme.in_group_size,
        out_group_size=1,
        num_codebooks=scheme.num_codebooks,
        nbits_per_codebook=scheme.nbits_per_codebook,
        bias=False,
        device="cuda",
        dtype=torch.bfloat16,
    )
    for name, part in zip(("codes", "codebooks", "scales"), weight.parts(), strict=True):
        getattr(linear, name).data = part
    return linear
