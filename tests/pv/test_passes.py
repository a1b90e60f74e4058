"""The passes of tune_pv: a product's gradients are exact to float32; a CUDA graph of passes does what they do."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from aqlm_tensor import AQLMTensor, PVConfig, tune_pv
from aqlm_tensor.kernels import reference
from aqlm_tensor.linear import set_quantized
from aqlm_tensor.pv.codes import CURVATURE_PASSES, LossModel
from aqlm_tensor.pv.graph import GraphedPasses, as_if_captured, gpu_of
from aqlm_tensor.pv.layers import tuned_weights
from aqlm_tensor.pv.loss import call_model, token_loss
from aqlm_tensor.pv.rows import Rows
from tests.pv.models import QUICK, Decoder, divergence, prepared
from tests.test_fusion import llama

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize(("scheme", "partitions"), [("2x5g8", 1), ("1x9g4o2", 1), ("3x4g8", 2)])
@pytest.mark.parametrize("keep_order", [True, False])
def test_gradients_of_a_product(scheme: str, partitions: int, keep_order: bool) -> None:
    parts = [AQLMTensor.from_hp(torch.randn(24, 32), scheme, seed=number) for number in range(partitions)]
    weight: Any = torch.cat(tuple(parts))
    layer = nn.Linear(32, 24 * partitions)
    set_quantized([layer], weight)
    x, upstream = torch.randn(3, 5, 32, requires_grad=True), torch.randn(3, 5, 24 * partitions)
    with tuned_weights(layer, keep_order=keep_order) as ([tuned], _):
        tuned.codes.copy_(tuned.codes)  # changed in place: an order that was kept is old
        for parameter in (tuned.codebooks, tuned.scales, layer.bias):
            parameter.requires_grad_(True)
        for _ in range(2):
            layer(x).backward(upstream)
        found = [x.grad, tuned.codebooks.grad, tuned.scales.grad, layer.bias.grad]
    wide = [part.double().requires_grad_(part.is_floating_point()) for part in weight.parts()[1:]]
    dense = reference.dequantize(weight.codes, *[part.detach() for part in wide])
    flat, rows = upstream.double().flatten(0, 1), x.detach().double().flatten(0, 1)
    to_parts = reference.dequantize_param_grad(flat.T @ rows, weight.codes, *[part.detach() for part in wide])
    exact = [(flat @ dense).view_as(x), *to_parts, flat.sum(0)]
    for ours, theirs in zip(found, exact, strict=True):
        assert ours is not None
        assert float((ours.double() - 2 * theirs).norm()) < 1e-6 * float(theirs.norm())


def test_what_is_learned_from_passes() -> None:
    model = LossModel(6, 8, torch.device("cpu"))
    assert model.factors(1, Rows()) is None
    passes = [(torch.randn(10, 8), torch.randn(6, 8), torch.randn(10, 6)) for _ in range(CURVATURE_PASSES + 3)]
    for one in passes:
        model.learn(*one)
    factors = model.factors(1, Rows())
    assert factors is not None
    torch.testing.assert_close(factors[0], torch.stack([gradient for _, gradient, _ in passes]).mean(0))
    seen = passes[:CURVATURE_PASSES]
    products = torch.stack([x.T @ x for x, _, _ in seen]).mean(0)
    metric = products / products.diagonal().mean() + 0.1 * torch.eye(8)
    torch.testing.assert_close(factors[1], metric)
    power = torch.stack([y.square().sum(0) for _, _, y in seen]).mean(0) * products.diagonal().mean()
    torch.testing.assert_close(factors[2], power)


def test_only_models_on_one_gpu_are_captured() -> None:
    assert gpu_of([Decoder()]) is None
    assert gpu_of([Decoder().to("meta")]) is None


class OnTheHost(TorchDispatchMode):
    """Finds operations that look at values on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_captured_pass_through_a_transformers_model_looks_at_nothing() -> None:
    model, batch = llama(), torch.randint(40, (2, 16))
    with tuned_weights(model) as (weights, _):
        for weight in weights:
            weight.codebooks.requires_grad_(True)
        with torch.no_grad():
            teacher = call_model(model, batch)
        with as_if_captured(), OnTheHost() as watched:
            token_loss(call_model(model, batch), batch, teacher).backward()
        assert watched.found == []
        with OnTheHost() as watched:
            call_model(model, batch)
        assert watched.found, "this test can fail"


def tuned(config: PVConfig) -> tuple[Any, Decoder, list[Tensor], Any]:
    torch.manual_seed(0)
    model, dense, data = prepared("2x4g8")
    model, dense = model.cuda(), dense.cuda()
    data = [batch.cuda() for batch in data]
    return model, dense, data, tune_pv(model, dense, data, config=config)


@gpu
@needs_gpu
@pytest.mark.parametrize(
    "changes",
    [{"code_fraction": 0.0}, {}, {"gradient_memory": 1}, {"gradient_checkpointing": True}, {"batches_per_step": 3}],
)
def test_replayed_passes_do_what_passes_do(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[bool] = []
    capture = GraphedPasses._capture

    def counted(self: GraphedPasses, batch: Sequence[Tensor]) -> None:
        capture(self, batch)
        captured.append(self._graph is not None)

    monkeypatch.setattr(GraphedPasses, "_capture", counted)
    settings = {"epochs": 4, "lr": 1e-2, "steps_per_round": 9, "validation": 0.25, "precision": "float32"} | changes
    with_graph = tuned(PVConfig(**settings))
    assert captured
    assert all(captured)
    without = tuned(PVConfig(**settings, cuda_graph=False))
    first, second = with_graph[3].rounds[0], without[3].rounds[0]
    assert first.training == pytest.approx(second.training, rel=1e-4)
    assert first.validation == pytest.approx(second.validation, rel=1e-3)
    model, dense, data, report = with_graph
    assert report.loss_after == pytest.approx(divergence(model, dense, data[-3:]), rel=1e-3)
    assert report.loss_after < 0.7 * report.loss_before
    assert all(parameter.grad is None for parameter in model.parameters())


class Waiting(nn.Module):
    """A model that looks at a value on the host, as mixtures of experts do."""

    def __init__(self, inner: Decoder) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner(tokens) * (2.0 if float(tokens.sum()) < 0 else 1.0)


@gpu
@needs_gpu
def test_passes_that_wait_for_the_gpu_are_run_as_they_are() -> None:
    model, dense, data = prepared()
    model, dense = Waiting(model.cuda()), dense.cuda()
    report = tune_pv(model, dense, [batch.cuda() for batch in data], config=QUICK)
    assert report.loss_after < 0.8 * report.loss_before
    other = copy.deepcopy(model)
    other(data[0].cuda())
