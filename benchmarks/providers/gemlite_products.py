"""gemlite's products with 2- and 4-bit weights (Triton): groups of 128 with a scale and a zero each.

It tunes each kernel at the first use of a shape. Another accuracy than AQLM at the same bits: uniform steps.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from providers.gpu import Provided

__all__ = ["gemlite_product", "gemlite_weights"]

_GROUP = 128


def gemlite_weights(weight: Tensor, bits: int, copies: int) -> list[tuple[Any, Tensor]]:
    """Random layers of the shape [O, I] of a weight, in its dtype, each with the dense weight it stands for."""
    out, inner = weight.shape
    return [_layer(out, inner, weight.dtype, bits) for _ in range(copies)]


def _layer(out: int, inner: int, dtype: torch.dtype, bits: int) -> tuple[Any, Tensor]:
    from gemlite import DType, GemLiteLinear  # pyright: ignore[reportMissingImports]

    values = torch.randint(0, 1 << bits, (out, inner), dtype=torch.uint8, device="cuda")
    # powers of two: gemlite multiplies and adds in x's dtype, which then rounds nothing
    scales = torch.randint(-1, 2, (out * inner // _GROUP, 1), device="cuda").exp2().to(dtype)
    zeros = torch.full_like(scales, (1 << bits) / 2)
    float_type = DType.BF16 if dtype == torch.bfloat16 else DType.FP16
    layer = GemLiteLinear(
        bits,
        group_size=_GROUP,
        in_features=inner,
        out_features=out,
        input_dtype=float_type,
        output_dtype=float_type,
    )
    layer.pack(values, scales, zeros, None)
    dense = (values.view(-1, _GROUP).to(dtype) - zeros) * scales
    return layer, dense.view(out, inner)


def gemlite_product(layers: Sequence[tuple[Any, Tensor]], bits: int, x: Tensor) -> dict[str, Provided]:
    """Its product with each of the layers."""
    stored = sum(tensor.nbytes for tensor in layers[0][0].get_tensor_args() if isinstance(tensor, Tensor))
    return {f"gemlite {bits} bit": Provided(lambda i: layers[i][0](x), len(layers), layers[0][1], stored)}
