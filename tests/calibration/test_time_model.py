"""estimate_seconds and what is told while a run goes on: against times measured on one H100, and a clock."""

from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from aqlm_tensor import AQLMWeightConfig, FinetuneConfig, SolverConfig
from aqlm_tensor.calibration import report
from aqlm_tensor.calibration.report import Pace
from aqlm_tensor.calibration.time_model import estimate_seconds, layer_seconds
from aqlm_tensor.scheme import AQLMScheme
from tests.calibration.test_memory_model import Block


@pytest.mark.parametrize(
    ("shape", "scheme", "measured"),
    [
        ((576, 576), "2x8g8", 0.148),
        ((4096, 4096), "2x8g8", 0.772),
        ((14336, 4096), "2x8g8", 2.591),
        ((28672, 8192), "2x8g8", 13.774),
        ((4096, 4096), "1x16g8", 3.998),
        ((14336, 4096), "1x16g8", 5.794),
    ],
)
def test_layers_that_were_measured_on_a_gpu(shape: tuple[int, int], scheme: str, measured: float) -> None:
    assert layer_seconds(*shape, AQLMScheme.parse(scheme), SolverConfig()) == pytest.approx(measured, rel=0.17)


def test_a_run_that_was_measured_on_a_gpu() -> None:
    """SmolLM2-135M, 128 windows of 1024 tokens in batches of 4, fine-tuned."""
    with torch.device("meta"):
        model = nn.Sequential(nn.ModuleList(Block(576, 1536, 192) for _ in range(30)))
    config = AQLMWeightConfig("2x8g8")
    seconds = estimate_seconds(model, config, tokens=131072, batch_tokens=4096, finetune=FinetuneConfig())
    assert sum(seconds.values()) == pytest.approx(60.2, rel=0.1)
    plain = estimate_seconds(model, config, tokens=131072, batch_tokens=4096)
    assert {phase: seconds[phase] for phase in plain} == plain
    assert set(seconds) - set(plain) == {"fine-tune"}


def test_fine_tuning_that_was_measured_on_a_gpu() -> None:
    """Two blocks of 8B, 128 windows of 1024 tokens, all epochs."""
    with torch.device("meta"):
        model = nn.Sequential(nn.ModuleList(Block(4096, 14336, 1024) for _ in range(2))).bfloat16()
    config, tuning = AQLMWeightConfig("2x8g8"), FinetuneConfig()
    seconds = estimate_seconds(model, config, tokens=131072, batch_tokens=1024, finetune=tuning)
    assert seconds["fine-tune"] == pytest.approx(8.1, rel=0.1)


def test_processes_and_experts() -> None:
    config = AQLMWeightConfig("2x8g8")
    shape: dict[str, Any] = {"tokens": 131072, "batch_tokens": 4096}
    with torch.device("meta"):
        model = nn.Sequential(nn.ModuleList(Block(4096, 11008, 1024) for _ in range(2)))
        sizes: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 1}
        experts = tf.MixtralForCausalLM(tf.MixtralConfig(**sizes, num_local_experts=8))
    one, four = (estimate_seconds(model, config, **shape, processes=count) for count in (1, 4))
    assert one["propagate"] == pytest.approx(4 * four["propagate"])
    down = layer_seconds(4096, 11008, AQLMScheme.parse("2x8g8"), SolverConfig())
    assert four["quantize"] >= 2 * down, "the largest layer bounds what processes gain"
    assert one["quantize"] > 2 * four["quantize"]
    found, shared = (estimate_seconds(experts, config, **shape, processes=count)["quantize"] for count in (1, 8))
    scheme, solver = AQLMScheme.parse("2x8g8"), SolverConfig()
    expert = 2 * layer_seconds(2048, 1024, scheme, solver) + layer_seconds(1024, 2048, scheme, solver)
    assert found > 8 * expert
    assert shared < found - 6.9 * expert


def test_time_left_is_told_from_blocks_that_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(report.time, "perf_counter", lambda: now)
    pace = Pace()
    pace.begin(100)
    assert pace.left(2) == (None, None)
    now = 5.0
    pace.quantized(25)
    assert pace.left(2) == (15.0, 55.0), "a quarter took 5 s"
    pace.quantized(75)
    assert pace.left(2) == (None, None), "what comes now is not known"
    now = 30.0
    pace.end()
    pace.begin(100)
    now = 34.0
    assert pace.left(1) == (26.0, 56.0)
    now = 70.0
    assert pace.left(1) == (0.0, 30.0)
