"""Mixtures of experts: every implementation that Transformers has, on codes, expert by expert."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import aqlm_tensor.integrations.hf  # noqa: F401 - registers
from aqlm_tensor import AQLMTensor, trainable
from aqlm_tensor.kernels import reference
from tests.tensor.weights import random_weight

from .official import FAMILIES, Pair, logits_of, write_pair

IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair(tmp_path_factory.mktemp("mixtral"), FAMILIES["mixtral"])


def load(folder: Path, **options: Any) -> Any:
    return FAMILIES["mixtral"].auto.from_pretrained(folder, **options)


def test_layout(pair: Pair) -> None:
    experts = load(pair.aqlm).model.layers[0].mlp.experts
    assert experts.gate_up_proj.shape == (4, 256, 64)
    assert experts.gate_up_proj.codebooks.shape == (4, 2, 2, 256, 1, 8)  # [E, P, K, entries, og, ig]
    assert experts.down_proj.codebooks.shape == (4, 2, 256, 1, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_implementations(pair: Pair, implementation: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = load(pair.dense, experts_implementation="eager", dtype=dtype)
    model = load(pair.aqlm, experts_implementation=implementation, dtype=dtype)

    def never(self: AQLMTensor) -> torch.Tensor:
        raise AssertionError("a stack of experts was made dense")

    monkeypatch.setattr(AQLMTensor, "dequantize", never)
    for tokens in (None, torch.tensor([[5]])):
        ours, theirs = logits_of(model, tokens).float(), logits_of(dense, tokens).float()
        assert float((ours - theirs).norm() / theirs.norm()) < (2e-6 if dtype == torch.float32 else 6e-2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_reach_the_input(pair: Pair, implementation: str) -> None:
    hidden = torch.randn(2, 7, 64)
    gradients = []
    for folder, name in ((pair.aqlm, implementation), (pair.dense, "eager")):
        block = load(folder, experts_implementation=name).model.layers[0].mlp
        x = hidden.clone().requires_grad_()
        block(x).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def stack_gradients(pair: Pair, implementation: str, compiled: bool) -> dict[str, torch.Tensor]:
    block = load(pair.aqlm, experts_implementation=implementation).model.layers[0].mlp
    with trainable(block):
        names = {name for name, _ in block.named_parameters()}
        assert {"experts.gate_up_proj.codebooks", "experts.down_proj.scales"} <= names
        assert not any(isinstance(parameter, AQLMTensor) for parameter in block.parameters())
        run: Any = torch.compile(block, backend="aot_eager") if compiled else block
        run(torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(0))).square().sum().backward()
        return {name: parameter.grad for name, parameter in block.named_parameters()}


@pytest.mark.parametrize(
    ("implementation", "compiled"),
    [*((name, False) for name in IMPLEMENTATIONS), ("batched_mm", True), ("grouped_mm", True)],
)
def test_gradients_of_codebooks_and_scales(pair: Pair, implementation: str, compiled: bool) -> None:
    """Those of the dense weights, carried on to the entries that make them up."""
    torch._dynamo.reset()
    found = stack_gradients(pair, implementation, compiled)
    experts = load(pair.aqlm).model.layers[0].mlp.experts
    block = load(pair.dense, experts_implementation="eager").model.layers[0].mlp
    block(torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    for name in ("gate_up_proj", "down_proj"):
        dense = block.experts.get_parameter(name).grad
        parts = [getattr(experts, name).experts()[expert] for expert in range(4)]
        expected = [reference.dequantize_param_grad(grad, *own) for grad, own in zip(dense, parts, strict=True)]
        for index, part in enumerate(("codebooks", "scales")):
            gradient = found[f"experts.{name}.{part}"]
            torch.testing.assert_close(gradient, torch.stack([e[index] for e in expected]), rtol=1e-4, atol=1e-5)


def test_training_experts(pair: Pair) -> None:
    model = load(pair.aqlm)
    weight, tokens = model.model.layers[0].mlp.experts.down_proj, torch.arange(3, 17).view(2, 7)
    codes, order = weight.codes.clone(), [name for name, _ in model.named_parameters()]
    cls, before = type(model.model.layers[0].mlp.experts), model(tokens, labels=tokens).loss
    with trainable(model):
        trained = [p for name, p in model.named_parameters() if name.endswith(("proj.codebooks", "proj.scales"))]
        optimizer = torch.optim.Adam(trained, lr=1e-3)
        for _ in range(5):
            optimizer.zero_grad()
            model(tokens, labels=tokens).loss.backward()
            optimizer.step()
        inside = model(tokens, labels=tokens).loss
    assert inside < before - 0.1
    assert model.model.layers[0].mlp.experts.down_proj is weight
    assert type(model.model.layers[0].mlp.experts) is cls
    assert [name for name, _ in model.named_parameters()] == order
    assert torch.equal(weight.codes, codes)
    torch.testing.assert_close(model(tokens, labels=tokens).loss, inside)


def test_no_gradient_gets_lost(pair: Pair) -> None:
    experts = load(pair.aqlm).model.layers[0].mlp.experts
    with trainable(experts):
        for lossy in (lambda w: w[:2], lambda w: w.chunk(2, 1), lambda w: w.clone(), lambda w: w[None]):
            with pytest.raises(RuntimeError, match="would get lost"):
                lossy(experts.down_proj)
        with torch.no_grad():
            assert experts.down_proj[:2].shape == (2, 64, 128)
        experts.to(torch.bfloat16)
    assert experts.down_proj.dtype == experts.down_proj.codebooks.dtype == torch.bfloat16


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_one_graph(pair: Pair, implementation: str) -> None:
    torch._dynamo.reset()
    model = load(pair.aqlm, experts_implementation=implementation)
    expected = logits_of(model)
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits_of(compiled), expected)


@pytest.mark.parametrize("ends", [[2, 2, 7], [0, 0, 0], [7, 7, 7], [0, 3, 5]])
@pytest.mark.parametrize("partitions", [0, 2])
def test_grouped_mm(ends: list[int], partitions: int) -> None:
    stack = random_weight("2x4g8", 32, 64, experts=3, partitions=partitions)
    offsets, x = torch.tensor(ends, dtype=torch.int32), torch.randn(7, 64, requires_grad=True)
    y = F.grouped_mm(x, stack.mT, offs=offsets)
    dense = stack.dequantize()
    starts = [0, *ends[:-1]]
    runs = [x[a:b] @ dense[e].mT for e, (a, b) in enumerate(zip(starts, ends, strict=True))]
    expected = torch.cat([*runs, torch.zeros(7 - ends[-1], 32)])
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    grads = [torch.autograd.grad(out.square().sum(), x, retain_graph=True)[0] for out in (y, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-3)


def test_the_op_is_sound() -> None:
    stack = random_weight("2x4g8", 32, 64, experts=3)
    x = torch.randn(7, 64, requires_grad=True)
    op = torch.ops.aqlm_tensor.experts_linear.default
    codes, codebooks, scales = stack.parts()
    for trains in (False, True):
        weight = codes, codebooks.clone().requires_grad_(trains), scales.clone().requires_grad_(trains)
        torch.library.opcheck(op, (x, *weight, torch.tensor([2, 2, 7])))


def test_what_grouped_mm_refuses() -> None:
    stack, x = random_weight("2x4g8", 32, 64, experts=3), torch.randn(7, 64)
    offsets = torch.tensor([2, 2, 7], dtype=torch.int32)
    with pytest.raises(ValueError, match="needs rows"):
        F.grouped_mm(x, stack, offs=offsets)
    with pytest.raises(ValueError, match="do not fit"):
        F.grouped_mm(x, stack.mT, offs=offsets[:2])
    with pytest.raises(ValueError, match="do not fit"):
        F.grouped_mm(x[:, :8], stack.mT, offs=offsets)
    with pytest.raises(ValueError, match="no bias"):
        F.grouped_mm(x, stack.mT, offs=offsets, bias=torch.zeros(32))
