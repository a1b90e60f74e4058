"""estimate_memory: against peaks measured on one H100, and against what a run on the CPU allocates."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from aqlm_tensor import calibrate
from aqlm_tensor.calibration.memory_model import MemoryEstimate, estimate_memory
from aqlm_tensor.cli.app import app
from tests.calibration.test_calibrate import model_and_data
from tests.models import config
from tests.tiny_llama import write_dense


class Attention(nn.Module):
    """The projections of a Llama block's attention."""

    def __init__(self, width: int, narrow: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, out, bias=False) for out in (width, narrow, narrow))
        self.o_proj = nn.Linear(width, width, bias=False)


class Block(nn.Module):
    """The linear layers of a Llama block."""

    def __init__(self, width: int, middle: int, narrow: int) -> None:
        super().__init__()
        self.norms = nn.ParameterList([torch.ones(width), torch.ones(width)])
        self.attention = Attention(width, narrow)
        self.gate_proj, self.up_proj = (nn.Linear(width, middle, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(middle, width, bias=False)


def predicted(shape: tuple[int, int, int], tokens: int, blocks: int = 1, **options: Any) -> MemoryEstimate:
    with torch.device("meta"):
        model = nn.Sequential(nn.ModuleList(Block(*shape) for _ in range(blocks))).bfloat16()
    return estimate_memory(model, config("2x8g8"), tokens=tokens, batch_tokens=1024, **options)


SEVEN, SEVENTY = (4096, 11008, 4096), (8192, 28672, 1024)


@pytest.mark.parametrize(("tokens", "finetune", "measured"), [(65536, False, 3640007168), (16384, True, 3363183104)])
def test_peaks_that_were_measured_on_a_gpu(tokens: int, finetune: bool, measured: int) -> None:
    """One H100, torch 2.11, the model in CPU memory and one block at a time on the GPU; while layers are solved."""
    estimate = predicted(SEVEN, tokens, finetune=finetune)
    assert estimate.peak == estimate.device["quantize"] == pytest.approx(measured, rel=0.01)


def test_whole_models_fit_the_gpus_that_they_should() -> None:
    seven = predicted(SEVEN, 128 * 1024, blocks=32, finetune=True)
    assert seven.peak < 8e9
    assert seven.result < 1.8e9
    assert predicted(SEVENTY, 128 * 1024, blocks=80, finetune=True).peak < 24e9


def test_what_is_kept_elsewhere_is_counted_there() -> None:
    device, cpu, disk = (predicted(SEVEN, 65536, keep_inputs=place) for place in ("device", "cpu", "disk"))
    inputs = 2 * 65536 * 4096 * 2
    assert device.peak - cpu.peak == (65536 - 1024) * 4096 * 2
    assert cpu.host - device.host == disk.work_dir - device.work_dir == inputs
    on_device = predicted(SEVEN, 65536, blocks=4, model_on_device=True)
    assert on_device.peak - device.peak == 3 * device.host
    assert on_device.host == 0


def test_disk_is_what_a_run_writes(tmp_path: Path) -> None:
    model, data = model_and_data()
    estimate = estimate_memory(model, config("2x3g8"), tokens=192, batch_tokens=32)
    calibrate(model, config("2x3g8"), data, work_dir=tmp_path)
    written = sum(file.stat().st_size for file in tmp_path.glob("layer.*"))
    assert 0 <= written - estimate.work_dir < 6 * 2048, "headers and reports are not counted"


def test_the_command_reads_the_config_only(tmp_path: Path) -> None:
    folder = write_dense(tmp_path / "dense")
    (folder / "model.safetensors").unlink()
    arguments = ["estimate", str(folder), "--scheme", "2x4g8", "--nsamples", "4", "--seqlen", "64"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "on the device, at most" in result.stdout
    assert "on one H100" in result.stdout
    report = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert report["device_peak"] == max(report["device"].values())
    assert "fine-tune" not in report["device"]
    assert "fine-tune" in json.loads(CliRunner().invoke(app, [*arguments, "--json", "--finetune"]).stdout)["device"]
    bad = CliRunner().invoke(app, [*arguments, "--keep-inputs", "attic"])
    assert bad.exit_code == 2
