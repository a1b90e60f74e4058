"""Mixtures of experts: every implementation that Transformers has, on codes, expert by expert."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import aqlm_tensor.integrations.hf  # noqa: F401 - registers
from aqlm_tensor import AQLMTensor
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
    torch.library.opcheck(op, (x, *stack.parts(), torch.tensor([2, 2, 7])))


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
