"""tune_pv: the loss falls, codes change, nothing ends worse, and what options do."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aqlm_tensor import AQLMTensor, PVConfig, quantize_, tune_pv
from aqlm_tensor.linear import set_quantized
from aqlm_tensor.pv.codes import next_choice
from aqlm_tensor.pv.report import PVRound
from tests.calibration.test_calibrate import assert_same
from tests.models import TiedLM, config
from tests.pv.models import QUICK, batches, codes, divergence, prepared


def test_the_loss_falls_codes_change_and_the_report_tells_the_truth() -> None:
    model, dense, data = prepared()
    held_out = data[-3:]
    before, old = divergence(model, dense, held_out), codes(model)
    head, norm = model.head.weight.clone(), model.get_parameter("blocks.0.norm.weight").clone()
    rounds: list[PVRound] = []
    report = tune_pv(model, dense, data, config=QUICK, on_round=rounds.append)
    after = divergence(model, dense, held_out)
    assert report.loss_before == pytest.approx(before, rel=1e-4)
    assert report.loss_after == pytest.approx(after, rel=1e-4)
    assert after < 0.7 * before
    shares = [float((a != b).any(-1).float().mean()) for a, b in zip(old, codes(model), strict=True)]
    assert list(report.changed.values()) == pytest.approx(shares)
    assert max(shares) > 0, "no code changed"
    assert max(r.changed for r in rounds) <= QUICK.code_fraction
    assert tuple(rounds) == report.rounds
    assert [r.step for r in rounds] == [6, 12, 18, 24, 27]
    assert torch.equal(model.head.weight, head), "dense matrices stay"
    assert not torch.equal(model.get_parameter("blocks.0.norm.weight"), norm), "norms are trained"
    assert type(model.get_submodule("blocks.0.up")) is nn.Linear
    assert "forward" not in vars(model.get_submodule("blocks.0.up"))
    assert "27 steps in 5 rounds" in str(report)


def test_the_choice_of_codes_alone_mends_wrong_ones_and_more() -> None:
    model, dense, _ = prepared("2x5g8")
    data = batches(48)
    fine = divergence(model, dense, data[-6:])
    weight = model.get_submodule("blocks.0.down").weight
    assert isinstance(weight, AQLMTensor)
    wrong = torch.rand(weight.codes.shape[:2]) < 0.3
    weight.codes[wrong] = torch.randint(-16, 16, weight.codes.shape, dtype=torch.int8)[wrong]
    standstill = PVConfig(epochs=6, lr=1e-12, steps_per_round=8, validation=0.125, patience=99)
    report = tune_pv(model, dense, data, config=standstill)
    assert report.loss_before > 2 * fine
    assert report.loss_after < 0.5 * fine
    assert report.changed["blocks.0.down"] > 0.3
    assert all(share.changed <= standstill.code_fraction for share in report.rounds)


@pytest.mark.parametrize(
    ("changed", "due", "made"),
    [
        ([], 0, 0),
        ([0.1, 0.2], 2, 2),
        ([0.0], 2, 1),
        ([0.0, 0.0, 0.0], 6, 2),
        ([0.0, 0.0, 0.1], 3, 2),
        ([0.1, 0.0, 0.0], 3, 2),
    ],
)
def test_after_a_choice_that_was_undone_rounds_go_without(changed: list[float], due: int, made: int) -> None:
    assert next_choice(changed) == (due, made)


@pytest.mark.parametrize("trust_ratio", [0.02, 1e-6])
def test_little_trust_keeps_layers_where_they_are(trust_ratio: float) -> None:
    model, dense, data = prepared()
    layer = model.get_submodule("blocks.0.down")
    assert isinstance(layer.weight, AQLMTensor)
    before = layer.weight.dequantize()
    config = PVConfig(epochs=1, lr=1e-12, steps_per_round=5, validation=0.25, trust_ratio=trust_ratio)
    tune_pv(model, dense, data, config=config)  # 9 steps: codes are chosen once
    assert isinstance(layer.weight, AQLMTensor)
    moved = float((layer.weight.dequantize() - before).norm() / before.norm())
    assert moved <= trust_ratio


def test_a_hopeless_learning_rate_changes_nothing() -> None:
    model, dense, data = prepared()
    before = copy.deepcopy(model)
    report = tune_pv(model, dense, data, config=PVConfig(epochs=1, lr=1e3, steps_per_round=3, patience=2))
    assert report.loss_after == report.loss_before
    assert set(report.changed.values()) == {0.0}
    assert len(report.rounds) == 2, "patience ends it"
    assert_same(before, model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_never_worse_as_they_are_stored(dtype: torch.dtype) -> None:
    model, dense, data = prepared()
    model = model.to(dtype)
    training = [part.training for part in model.modules()]
    report = tune_pv(model, dense, data, config=QUICK)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert [part.training for part in model.modules()] == training
    wide = copy.deepcopy(model).float()
    assert divergence(wide, dense, data[-3:]) == pytest.approx(report.loss_after, rel=1e-3)
    assert report.loss_after < report.loss_before
    model(data[0])


def test_autocast_tunes_too() -> None:
    model, dense, data = prepared()
    before = divergence(model, dense, data[-3:])
    tune_pv(model, dense, data, config=PVConfig(epochs=3, lr=1e-2, steps_per_round=6, precision="bfloat16"))
    assert divergence(model, dense, data[-3:]) < 0.8 * before


@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}, {"batches_per_step": 1}])
def test_recomputing_activations_leaves_the_first_steps_alone(changes: dict[str, Any]) -> None:
    model, dense, data = prepared()
    other = copy.deepcopy(model)
    options = {"epochs": 1, "lr": 1e-2, "steps_per_round": 9, "validation": 0.25}
    tune_pv(model, dense, data, config=PVConfig(**options))
    tune_pv(other, dense, data, config=PVConfig(**options, **changes))
    assert_same(model, other)


def test_memory_for_gradients_can_be_bounded() -> None:
    model, dense, data = prepared()
    old = codes(model)
    settings = {"epochs": 6, "lr": 1e-2, "steps_per_round": 6, "validation": 0.25, "patience": 99}
    report = tune_pv(model, dense, data, config=PVConfig(**settings, gradient_memory=1))
    assert report.loss_after < report.loss_before
    assert len(old) == 4
    assert max(r.changed for r in report.rounds) < 0.02, "one of four layers in each round"


def test_partitions_keep_their_codebooks_apart() -> None:
    model, dense, data = prepared()
    layer = model.get_submodule("blocks.0.up")
    halves = [
        AQLMTensor.from_hp(part, "2x3g8", seed=number)
        for number, part in enumerate(dense.get_parameter("blocks.0.up.weight").detach().chunk(2))
    ]
    joined = torch.cat(tuple(halves))
    assert isinstance(joined, AQLMTensor)
    assert joined.partitions == 2
    assert isinstance(layer, nn.Linear)
    set_quantized([layer], joined)
    before, old = divergence(model, dense, data[-3:]), joined.codes.clone()
    tune_pv(model, dense, data, config=QUICK)
    assert divergence(model, dense, data[-3:]) < 0.8 * before
    assert isinstance(layer.weight, AQLMTensor)
    assert layer.weight.partitions == 2
    assert not torch.equal(layer.weight.codes, old)


def test_layers_that_share_a_weight_still_do() -> None:
    dense = TiedLM().eval()
    model = copy.deepcopy(dense)
    quantize_(model, config("2x3g8"), lambda module, _: module in (model.up, model.first, model.second))

    class Rows(nn.Module):
        """Logits [B, seqlen, vocabulary] of a model whose norm wants [N, width]."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, tokens: Tensor) -> Tensor:
            return self.inner(tokens.flatten()).view(*tokens.shape, -1)

    data = batches()
    report = tune_pv(Rows(model), Rows(dense), data, config=QUICK)
    assert report.loss_after < report.loss_before
    assert model.first.weight is model.second.weight
    assert list(report.changed) == ["inner.up", "inner.first"]


@pytest.mark.parametrize(
    ("settings", "moved"),
    [
        (PVConfig(epochs=1, lr=1e-2, steps_per_round=3, dense="none"), set()),
        (
            PVConfig(epochs=1, lr=1e-2, steps_per_round=3, dense="all"),
            {"embedding.weight", "head.weight", "blocks.0.norm.weight"},
        ),
    ],
)
def test_dense_parameters_on_request(settings: PVConfig, moved: set[str]) -> None:
    model, dense, data = prepared()
    before = {name: value.clone() for name, value in model.named_parameters() if not isinstance(value, AQLMTensor)}
    tune_pv(model, dense, data, config=settings)
    changed = {name for name, value in before.items() if not torch.equal(value, model.get_parameter(name))}
    assert moved <= changed
    assert bool(changed) == bool(moved)
    assert all(parameter.grad is None for parameter in model.parameters())
