"""aqlm-tensor quantize --tune pv."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

pytest.importorskip("transformers", reason="extra transformers")

from typer.testing import CliRunner

from aqlm_tensor.blocks import sample_windows
from aqlm_tensor.checkpoint import inspect
from aqlm_tensor.cli.app import app
from aqlm_tensor.hf_model import find_model, load_model, tokenize
from tests.calibration.test_experts import mixtral
from tests.cli.commands import QUICK, run
from tests.tiny_llama import TEXT, write_dense


def test_quantize_then_tune(tmp_path: Path) -> None:
    dense, out, text = write_dense(tmp_path / "dense"), tmp_path / "out", tmp_path / "text.txt"
    text.write_text(TEXT)
    options = ["--scheme", "2x3g8", "--data", str(text), "--nsamples", "6", "--seqlen", "32", "--tune", "pv", "--json"]
    done = CliRunner().invoke(app, ["quantize", str(dense), str(out), *options])
    assert done.exit_code == 0, done.output
    tuning = json.loads(done.stdout)["tuning"]
    assert tuning == json.loads((out / "tuning_report.json").read_text())
    assert tuning["loss_after"] < tuning["loss_before"]
    assert len(tuning["changed"]) == 14
    assert sum(info.scheme is not None for info in inspect(out)) == 14
    assert not (tmp_path / "out.work").exists()


@pytest.mark.full
def test_models_divided_over_two_processes(tmp_path: Path) -> None:
    dense, out, text = write_dense(tmp_path / "dense"), tmp_path / "out", tmp_path / "text.txt"
    text.write_text(TEXT)
    program = Path(sys.executable).with_name("aqlm-tensor")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    options = ["--scheme", "2x3g8", "--data", text, "--nsamples", "6", "--seqlen", "32", "--tune", "pv", "--shard"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    command = [*start, program, "quantize", dense, out, *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "tuning_report.json").read_text())
    assert report["loss_after"] < report["loss_before"]
    models = [load_model(find_model(folder))[0] for folder in (out, dense)]
    batch = sample_windows(tokenize(load_model(find_model(dense))[1], TEXT), 6, 32)[-1]
    with torch.no_grad():
        q, p = (model(batch).logits.double().log_softmax(-1) for model in models)
    assert float((p.exp() * (p - q)).sum(-1).mean()) == pytest.approx(report["loss_after"], rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tune", "pv", "--data", "generated", "--shard"], "start it by torchrun"),
        (["--tune", "lora", "--data", "generated"], "only choice is pv"),
        (["--tune", "pv"], "need --data"),
        (["--tune", "pv", "--data", "generated", "--nsamples", "1"], "at least 2 windows"),
    ],
)
def test_what_cannot_be_tuned_is_refused_first(options: list[str], message: str, tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "dense")
    done = CliRunner().invoke(app, ["quantize", str(dense), str(tmp_path / "out"), *options])
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())


def test_stacks_of_experts_are_refused_first(tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "dense")
    mixtral().save_pretrained(dense)
    options = ["--scheme", "1x4g4", "--data", "generated", "--tune", "pv"]
    done = CliRunner().invoke(app, ["quantize", str(dense), str(tmp_path / "out"), *options])
    assert done.exit_code == 2
    assert "cannot tune stacks of experts, such as model.layers.0.mlp.experts.gate_up_proj" in " ".join(
        done.output.split()
    )
    assert not (tmp_path / "out.work").exists()


def test_a_disk_that_is_full_while_tuning_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library safetensors has an error of its own for that."""

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    dense, out = write_dense(tmp_path / "dense"), tmp_path / "out"
    command = ("quantize", dense, out, *QUICK, "--data", tmp_path / "text.txt", "--tune", "pv")
    with monkeypatch.context() as broken:
        broken.setattr("aqlm_tensor.checkpoint_io.save_file", full)
        result = run(*command)
    assert result.exit_code == 1
    assert "tuning.partial: No space left on device" in result.stderr
    assert "finished work is kept in" in result.stderr
    assert run(*command, "--resume").exit_code == 0
