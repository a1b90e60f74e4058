"""Random layers drawn on a GPU, the float64 reference for them, and what every kernel for GPUs must do besides.

For weights too large for the CPU's strategies.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from aqlm_tensor.codes import codes_to_indices
from aqlm_tensor.kernels.registry import Op, Problem
from aqlm_tensor.scheme import AQLMScheme
from tests.conformance import assert_same_bits
from tests.strategies import Case

__all__ = [
    "ERRORS",
    "Layer",
    "Linear",
    "assert_captured_and_on_streams",
    "assert_empty",
    "dense",
    "needs_hopper",
    "product",
    "random_layer",
    "relative_error",
    "runs",
]

_ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
needs_hopper = [pytest.mark.gpu, pytest.mark.skipif(not _ON_HOPPER, reason="needs a Hopper GPU")]

ERRORS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}  # of ||y - ref|| / ||ref||, by dtype

Layer = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Linear = Callable[..., torch.Tensor]


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


def runs(module: Any, op: Op, case: Case) -> bool:
    """Whether a kernel claims to support the case on the current GPU."""
    sizes = (case.rows, case.in_features, case.out_features, case.partitions or 1, case.dtype)
    device = torch.device("cuda", torch.cuda.current_device())
    return module.supports(Problem(op, case.scheme, *sizes, device)) is None


def assert_captured_and_on_streams(linear: Linear, layer: Layer) -> None:
    """A captured product follows x, and products on several streams at once do not disturb each other."""
    codes, codebooks, scales, bias, x = layer
    linear(x, codes, codebooks, scales, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(x, codes, codebooks, scales, bias)
    x.mul_(2)
    graph.replay()
    assert_same_bits(y, linear(x, codes, codebooks, scales, bias))
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    outputs = []
    for stream in streams * 8:
        with torch.cuda.stream(stream):
            outputs.append(linear(x, codes, codebooks, scales, bias))
    torch.cuda.synchronize()
    for output in outputs:
        assert_same_bits(output, y)


def assert_empty(linear: Linear, layer: Layer) -> None:
    """Without rows there are no outputs, and without inputs they are the bias."""
    codes, codebooks, scales, bias, x = layer
    assert linear(x[:0], codes, codebooks, scales, bias).shape == (0, codes.shape[0])
    no_inputs = linear(x[:, :0], codes[:, :0], codebooks, scales, bias)
    assert_same_bits(no_inputs, bias.expand(x.shape[0], -1))
    assert_same_bits(linear(x[:, :0], codes[:, :0], codebooks, scales, None), torch.zeros_like(no_inputs))
