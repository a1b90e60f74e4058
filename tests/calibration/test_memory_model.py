"""estimate_memory: against peaks measured on one H100, and against what a run on the CPU allocates."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn
from typer.testing import CliRunner

from aqlm_tensor import AQLMTensor, calibrate
from aqlm_tensor.calibration.memory_model import MemoryEstimate, estimate_memory, owners_of
from aqlm_tensor.cli.app import app
from aqlm_tensor.ranks import Ranks
from tests.calibration.test_block_calls import token_ids
from tests.calibration.test_calibrate import model_and_data
from tests.calibration.test_experts import mixtral
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


MIXTRAL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SEVEN, SEVENTY = (4096, 11008, 4096), (8192, 28672, 1024)


@pytest.mark.parametrize(("tokens", "finetune", "measured"), [(65536, False, 3315929088), (16384, True, 3035959296)])
def test_peaks_that_were_measured_on_a_gpu(tokens: int, finetune: bool, measured: int) -> None:
    """One H200, torch 2.11, the model in CPU memory and one block at a time on the GPU; while layers are solved."""
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


def test_experts_are_counted(tmp_path: Path) -> None:
    model = mixtral()
    estimate = estimate_memory(model, config("1x4g4"), tokens=72, batch_tokens=24)
    calibrate(model, config("1x4g4"), token_ids(), work_dir=tmp_path)
    files = list(tmp_path.glob("layer.*"))
    assert len(files) == 2 * (4 + 2 * 4)
    weights = [part for p in model.parameters() for part in (p.parts() if isinstance(p, AQLMTensor) else (p,))]
    assert estimate.result == sum(part.nbytes for part in weights)
    written = sum(file.stat().st_size for file in files)
    assert 0 <= written - estimate.work_dir < len(files) * 2048, "headers and reports are not counted"


def test_every_expert_has_an_x_t_x_of_its_own() -> None:
    with torch.device("meta"):
        few, many = (tf.MixtralForCausalLM(tf.MixtralConfig(**MIXTRAL, num_local_experts=count)) for count in (2, 10))
    peaks = [
        estimate_memory(model, config("2x8g8"), tokens=2048, batch_tokens=1024).device["calibrate"]
        for model in (few, many)
    ]
    expert = 4 * 3 * 256 * 512  # bytes of its weights
    assert peaks[1] - peaks[0] == 8 * (expert + 8 * (256**2 + 512**2)) + 8 * 4 * 256, "and a row of the router"


def test_processes_divide_batches_and_layers() -> None:
    one, three = (predicted(SEVEN, 65536, blocks=2, processes=count) for count in (1, 3))
    inputs = 4096 * 2 * 1024
    # 64 batches of 1024 tokens: 22 for the first process
    assert one.device["propagate"] - three.device["propagate"] == 2 * 42 * inputs
    assert one.peak > three.peak
    assert one.result == three.result
    kept = [predicted(SEVEN, 65536, keep_inputs="disk", processes=count).work_dir for count in (1, 4)]
    assert kept[0] == kept[1], "on one disk"
    layers = [nn.Linear(8, rows, device="meta") for rows in (8, 40, 16, 24, 32)]
    owners = owners_of(layers, 2)
    assert [owners[layer] for layer in layers] == Ranks(None).divided([64, 320, 128, 192, 256], 2)


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
    many = CliRunner().invoke(app, [*arguments, "--processes", "2"])
    assert "for each of 2 processes" in many.stdout
    bad = CliRunner().invoke(app, [*arguments, "--keep-inputs", "attic"])
    assert bad.exit_code == 2
