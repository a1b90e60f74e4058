"""What tune_pv refuses, before it changes anything."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aqlm_tensor import PVConfig, fuse_, quantize_, tune_pv
from aqlm_tensor.pv.loss import call_model
from tests.calibration.test_calibrate import state
from tests.models import config
from tests.pv.models import QUICK, Decoder, batches, prepared


def fused() -> nn.Module:
    model = nn.Sequential(nn.Embedding(40, 64), Pair(), nn.Linear(64, 40))
    quantize_(model, config(), lambda module, name: name.startswith("1."))
    fuse_(model)
    return model


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate_proj(x).tanh() * self.up_proj(x)


def hooked() -> nn.Module:
    model = prepared()[0]
    layer = model.get_submodule("blocks.0.up")
    layer.forward = layer.forward  # as accelerate's hooks leave it
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Decoder, "no AQLM layer to tune"),
        (fused, "unfuse_"),
        (hooked, "remove_hook_from_module"),
        (lambda: prepared()[0].to("meta"), "meta device"),
    ],
)
def test_models_that_cannot_be_tuned(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tune_pv(make(), None, batches(), config=QUICK)


def test_bad_arguments_are_errors_before_any_change() -> None:
    model, dense, data = prepared()
    before = state(copy.deepcopy(model))
    cases: list[tuple[Any, Any, type[Exception], str]] = [
        (model, data, ValueError, "shares parameters"),
        ("dense", data, ValueError, "logits for 5 batches"),
        (3, data, TypeError, "teacher must be"),
        ([torch.zeros(4, 15, 40)] * 12, data, ValueError, r"batch 0 must have shape \[4, 16, \*\]"),
        ([torch.zeros(4, 16, 39)] * 12, data, ValueError, "same vocabulary"),
        (dense, data[:1], ValueError, "at least 2 batches"),
        (dense, torch.stack(data), TypeError, "sequence"),
        (dense, [*data, torch.zeros(4, 16)], ValueError, "batch 12 must be token ids"),
        (dense, [torch.zeros(4, dtype=torch.int64)] * 3, ValueError, "batch 0 must be token ids"),
        (dense, [*data, data[0][:0]], ValueError, "batch 12 must hold windows"),
        (dense, [*data, data[0][:, :1]], ValueError, "batch 12 must hold windows"),
    ]
    for teacher, given, error, message in cases:
        with pytest.raises(error, match=message):
            tune_pv(model, teacher, given, config=QUICK)
    broken = copy.deepcopy(dense)
    nn.init.constant_(broken.head.weight, float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        tune_pv(model, broken, data, config=QUICK)
    with pytest.raises(TypeError, match="PVConfig"):
        tune_pv(model, dense, data, config={})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="logits"):
        call_model(nn.Sequential(nn.Embedding(40, 8), nn.Flatten()), data[0])
    assert all(torch.equal(before[name], value) for name, value in state(model).items())


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs must be at least 1"),
        ({"lr": 0.0}, ValueError, "lr must be positive"),
        ({"trust_ratio": float("inf")}, ValueError, "trust_ratio must be positive and finite"),
        ({"code_fraction": 1.5}, ValueError, r"code_fraction must lie in \[0, 1\]"),
        ({"validation": 1}, ValueError, "validation must lie between"),
        ({"dense": "some"}, ValueError, "dense must be one of none, vectors, all"),
        ({"precision": "int4"}, ValueError, "precision must be one of"),
        ({"gradient_memory": 0}, ValueError, "gradient_memory must be None or positive"),
        ({"gradient_memory": 1.5}, TypeError, "gradient_memory must be an int"),
        ({"gradient_checkpointing": 1}, TypeError, "True or False"),
        ({"seed": "x"}, TypeError, "seed must be an int"),
    ],
)
def test_configs_that_make_no_sense(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PVConfig(**fields)
