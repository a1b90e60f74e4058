"""Blocks that have layers in common, layers that no data reach, and routers: what calibrate makes of them."""

import copy
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchao.quantization import FqnToConfig

from aqlm_tensor import AQLMTensor, FinetuneConfig, calibrate
from aqlm_tensor.blocks import linears_of
from tests.calibration.test_calibrate import Killed, assert_same
from tests.models import config


class Block(nn.Module):
    """A layer of its own, one that all blocks share, and adapters, of which each block calls its own."""

    def __init__(self, shared: nn.Parameter, adapters: list[nn.Parameter], index: int) -> None:
        super().__init__()
        self.own, self.shared = nn.Linear(32, 32), nn.Linear(32, 32)
        self.adapters = nn.ModuleList(nn.Linear(32, 32) for _ in adapters)
        self.index, self.shared.weight = index, shared
        for adapter, weight in zip(self.adapters, adapters, strict=True):
            assert isinstance(adapter, nn.Linear)
            adapter.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return x + self.own(torch.tanh(self.shared(x))) + self.adapters[self.index](x)


class Shared(nn.Module):
    """Three blocks; the last adapter is never called."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        shared, *adapters = (nn.Parameter(torch.randn(32, 32) / 6) for _ in range(5))
        self.embedding = nn.Embedding(50, 32)
        self.blocks = nn.Sequential(*(Block(shared, adapters, index) for index in range(3)))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.blocks(self.embedding(tokens))


def batches() -> list[Tensor]:
    return list(torch.randint(50, (3, 2, 16), generator=torch.Generator().manual_seed(0)))


SKIP = config("1x4g4", on_unobserved="skip")


def test_what_blocks_share_is_quantized_once_where_data_reach_it(tmp_path: Path) -> None:
    model = Shared()
    dense = copy.deepcopy(model)
    report = calibrate(model, SKIP, batches(), work_dir=tmp_path)
    expected = ["0.own", "0.shared", "0.adapters.0", "1.own", "1.adapters.1", "2.own", "2.adapters.2"]
    assert [layer.fqn for layer in report.layers] == [f"blocks.{name}" for name in expected]
    assert report.skipped == {"blocks.2.adapters.3": "it saw no data"}
    first, *others = model.blocks
    assert isinstance(first, Block)
    for block in others:
        assert isinstance(block, Block)
        assert block.shared.weight is first.shared.weight
        for ours, theirs in zip(block.adapters, first.adapters, strict=True):
            assert ours.weight is theirs.weight
    assert sum(isinstance(parameter, AQLMTensor) for parameter in model.parameters()) == 7
    resumed = copy.deepcopy(dense)
    again = calibrate(resumed, SKIP, batches(), work_dir=tmp_path, resume=True)
    assert_same(resumed, model)
    assert again.skipped == report.skipped


def test_killed_and_resumed(tmp_path: Path) -> None:
    whole = Shared()
    calibrate(whole, SKIP, batches())
    for stop in (2, 3, 4):

        def kill(progress: Any, stop: int = stop) -> None:
            if progress.done == stop:
                raise Killed

        with pytest.raises(Killed):
            calibrate(Shared(), SKIP, batches(), work_dir=tmp_path / str(stop), on_progress=kill)
        resumed = Shared()
        calibrate(resumed, SKIP, batches(), work_dir=tmp_path / str(stop), resume=True)
        assert_same(resumed, whole)


def test_layers_that_no_data_reach_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"1 of the 3 layers calibrated in block 2 saw no data: blocks.2.adapters.3"):
        calibrate(Shared(), config("1x4g4"), batches())
    found = calibrate(Shared(), config("1x4g4", on_unobserved="data_free"), batches())
    assert found.layers[-1].fqn == "blocks.2.adapters.3"
    assert found.layers[-1].tokens == 0


def test_tuning_one_block_must_not_change_another() -> None:
    model = Shared()
    with pytest.raises(ValueError, match="blocks 0 and 1 share shared.weight"):
        calibrate(model, SKIP, batches(), finetune=FinetuneConfig())
    assert not any(isinstance(parameter, AQLMTensor) for parameter in model.parameters())


class Odd(nn.Linear):
    """Computes something of its own."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return input @ self.weight.T


def test_layers_that_cannot_be_trained_are_told_before() -> None:
    model = nn.Sequential(nn.Embedding(50, 32), nn.Sequential(Odd(32, 32, bias=False), nn.ReLU()))
    with pytest.raises(ValueError, match=r"1.0 is a Odd, of which only the base class nn.Linear can be trained"):
        calibrate(model, config("1x4g4"), batches(), blocks=[model[1]], finetune=FinetuneConfig())


class Mixture(nn.Module):
    """Experts, and what chooses and weighs them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.shared_expert_gate = nn.Linear(32, 2), nn.Linear(32, 1)
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
        self.shared_expert = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.stack([expert(x) for expert in self.experts], -1) * self.gate(x).softmax(-1)[..., None, :]
        return x + parts.sum(-1) + self.shared_expert(x) * self.shared_expert_gate(x)


def test_routers_stay_dense_unless_they_are_named() -> None:
    model = nn.Sequential(nn.Embedding(50, 32), Mixture())
    names = ["1.experts.0", "1.experts.1", "1.shared_expert"]
    assert len(linears_of([model])) == 3
    quantized = copy.deepcopy(model)
    found = calibrate(quantized, config("1x4g4"), batches(), blocks=[quantized[1]])
    assert [layer.fqn for layer in found.layers] == names
    named = FqnToConfig(OrderedDict({"1.gate": config("1x1g2"), "1.experts.0": config("1x4g4")}))  # pyright: ignore
    found = calibrate(model, named, batches(), blocks=[model[1]])
    assert [layer.fqn for layer in found.layers] == ["1.gate", "1.experts.0"]
