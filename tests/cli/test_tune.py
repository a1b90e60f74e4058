"""aqlm-tensor quantize --tune pv."""

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="extra transformers")

from typer.testing import CliRunner

from aqlm_tensor.checkpoint import inspect
from aqlm_tensor.cli.app import app
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
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
