"""aqlm-tensor quantize on a tiny model: what it writes, what interrupts it, and how it resumes."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from aqlm_tensor import AQLMTensor, CalibrationReport, handler
from aqlm_tensor.cli import arguments, output
from aqlm_tensor.cli import quantize as quantize_command
from aqlm_tensor.evaluate import perplexity
from aqlm_tensor.hf_model import UnsuitableModelError, find_model, load_model, tokenize
from tests.cli.commands import QUICK, run
from tests.tiny_llama import TEXT


def test_quantized_folder_is_complete_and_loads_bit_for_bit(folder: Path) -> None:
    out = folder / "quantized"
    names = {file.name for file in out.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    one, tokenizer = load_model(find_model(out))
    other, _ = load_model(find_model(out))
    tokens = tokenize(tokenizer, TEXT)[None, :64]
    with torch.no_grad():
        assert torch.equal(one(tokens).logits, other(tokens).logits)
    assert sum(type(parameter).__name__ == "AQLMTensor" for parameter in one.parameters()) == 14
    assert one.lm_head.weight is one.model.embed_tokens.weight


def test_buffers_that_no_checkpoint_holds_are_right(folder: Path) -> None:
    model, _ = load_model(find_model(folder / "quantized"))
    dense = AutoModelForCausalLM.from_pretrained(folder / "dense")
    expected = dict(dense.named_buffers())
    assert expected
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, expected[name]), name


def test_the_same_seed_gives_the_same_files(folder: Path, tmp_path: Path) -> None:
    result = run("quantize", folder / "dense", tmp_path / "again", *QUICK, "--data", folder / "text.txt", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["calibration_tokens"] == 4 * 64
    assert len(report["layers"]) == 14
    name = "model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (folder / "quantized" / name).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again"], "the work folder is gone at the end"


def test_the_folder_holds_a_report_and_the_table_shows_every_block(folder: Path, tmp_path: Path) -> None:
    result = run("quantize", folder / "dense", tmp_path / "out", *QUICK, "--data", folder / "text.txt", "--finetune")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text(encoding="utf-8"))
    assert report["data"]["origin"]["file"] == str(folder / "text.txt")
    assert report["totals"]["layers"] == 14
    lines = [line for line in result.stdout.splitlines() if re.match(r" *\d+ 0\.", line)]
    assert len(lines) == 2
    for line, tuned in zip(lines, report["blocks"], strict=True):
        assert f"{tuned['error_before']:.4f}" in line
        assert f"{tuned['error_after']:.4f}" in line
    assert "block 2/2: q_proj" in result.stderr
    assert "layers: 14/14 layers" in result.stderr
    load_model(find_model(tmp_path / "out"))  # which the report does not disturb


def test_perplexity_on_the_way_is_in_the_report_and_its_plot(folder: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "out", folder / "text.txt"
    evaluation = ("--eval-data", text, "--eval-seqlen", "50", "--eval-every", "1")
    result = run("quantize", folder / "dense", out, *QUICK, "--data", text, *evaluation)
    assert result.exit_code == 0, result.output
    report = CalibrationReport.from_json((out / "quantization_report.json").read_text(encoding="utf-8"))
    assert [(point.stage, point.blocks) for point in report.perplexity] == [
        ("dense", 0),
        ("calibrated", 1),
        ("calibrated", 2),
    ]
    for point, name in ((report.perplexity[0], "dense"), (report.perplexity[2], "out")):
        model, tokenizer = load_model(find_model(out if name == "out" else folder / name))
        assert point.perplexity == pytest.approx(perplexity(model, tokenize(tokenizer, TEXT), 50).perplexity, rel=1e-5)
    assert CalibrationReport.from_json(report.to_json()) == report
    assert (out / "quantization_report.png").stat().st_size > 10_000
    shown = run("report", out, "--plot", tmp_path / "again.svg")
    assert shown.exit_code == 0, shown.output
    assert f"{report.perplexity[0].perplexity:.2f} dense (0)" in shown.stdout
    assert "quantized 14 layers" in shown.stdout
    assert "perplexity, windows of 50" in (tmp_path / "again.svg").read_text(encoding="utf-8")
    assert json.loads(run("report", out, "--json").stdout)["totals"]["layers"] == 14


def test_a_process_that_is_quiet_tells_its_failure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output.stderr, "quiet", True)
    assert "is no report that can be read" in run("report", folder / "dense").stderr


def test_torchrun_is_told_what_went_wrong(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(output.time, "sleep", waited.append)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        run("report", folder / "dense")
        told = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(tmp_path / "error.json"))
        assert "is no report that can be read" in str(told.message)
        assert len(waited) == int(rank), "the first process speaks first"


def test_without_a_tokenizer_token_ids_suffice(folder: Path, tmp_path: Path) -> None:
    dense, out = tmp_path / "dense", tmp_path / "out"
    shutil.copytree(folder / "dense", dense, ignore=shutil.ignore_patterns("tokenizer*"))
    np.save(tmp_path / "ids.npy", tokenize(load_model(find_model(folder / "dense"))[1], TEXT).numpy())
    quantize = ("quantize", dense, out, *QUICK, "--data")
    for text in (folder / "text.txt", "conversations"):
        refused = run(*quantize, text)
        assert refused.exit_code == 2, refused.output
        assert "holds no tokenizer" in refused.stderr
        assert "loading" not in refused.stderr
    done = run(*quantize, tmp_path / "ids.npy", "--eval-data", tmp_path / "ids.npy", "--eval-seqlen", "50")
    assert done.exit_code == 0, done.output
    assert "so out will not, either" in done.stderr.replace(f"{tmp_path}/", "")
    name = "model.safetensors"
    assert (out / name).read_bytes() == (folder / "quantized" / name).read_bytes()
    assert not list(out.glob("tokenizer*"))
    seqlen = ("--seqlen", "50", "--json")
    measured = [run("eval", out, "--data", tmp_path / "ids.npy", *seqlen)]
    measured.append(run("eval", folder / "quantized", "--data", folder / "text.txt", *seqlen))
    assert [one.exit_code for one in measured] == [0, 0], measured[0].output
    values = {json.loads(one.stdout)["perplexity"] for one in measured}
    assert len(values) == 1
    assert f"{values.pop():.2f} calibrated" in done.stdout
    assert run("generate", out, "--prompt", "the cat").exit_code == 2


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_a_tokenizer_that_knows_no_words_is_none(kind: str, tmp_path: Path) -> None:
    """Transformers makes such ones of a bare config, and they read every text as unknown words, or as nothing."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UnsuitableModelError, match="holds no tokenizer, and text needs one"):
        load_model(find_model(tmp_path))


def test_no_report_is_told_in_a_line(folder: Path) -> None:
    result = run("report", folder / "dense")
    assert result.exit_code == 2
    assert "is no report that can be read" in result.stderr


def test_options_of_where_and_in_what_order(folder: Path, tmp_path: Path) -> None:
    common = ("quantize", folder / "dense")
    options = (*QUICK, "--data", folder / "text.txt")
    files = {}
    for name, more in {
        "disk": ("--keep-inputs", "disk"),
        "sequential": ("--true-sequential",),
        "dense": ("--no-blockwise",),
    }.items():
        result = run(*common, tmp_path / name, *options, *more)
        assert result.exit_code == 0, result.output
        files[name] = (tmp_path / name / "model.safetensors").read_bytes()
    plain = (folder / "quantized" / "model.safetensors").read_bytes()
    assert files["disk"] == plain
    assert len({plain, files["sequential"], files["dense"]}) == 3


def test_interrupted_it_says_how_to_resume_and_resumes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("quantize", folder / "dense", tmp_path / "out", *QUICK, "--data", folder / "text.txt")
    solve, calls = handler.quantize_layer, []

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return solve(*args, **kwargs)

    monkeypatch.setattr(handler, "quantize_layer", interrupt)
    result = run(*arguments)
    assert result.exit_code == 130
    assert f"kept in {tmp_path / 'out.work'}: run the same command with --resume" in result.stderr
    refused = run(*arguments)
    assert refused.exit_code == 2
    assert "go on with it with --resume" in refused.stderr
    calls.clear()
    monkeypatch.setattr(handler, "quantize_layer", lambda *a, **k: calls.append(1) or solve(*a, **k))
    resumed = run(*arguments, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert len(calls) == 14 - 8
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (folder / "quantized" / name).read_bytes()


@pytest.mark.full
def test_two_processes_write_the_files_of_one(folder: Path, tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("aqlm-tensor")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command = ["quantize", folder / "dense", tmp_path / "out", *QUICK, "--data", folder / "text.txt"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    done = subprocess.run(
        [*start, program, *command], capture_output=True, text=True, env=environment, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (folder / "quantized" / name).read_bytes()
    assert done.stdout.count("saved ") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("error", "remedy"),
    [(torch.OutOfMemoryError("CUDA out of memory"), "--keep-inputs"), (OSError(28, "No space left"), "Make room")],
)
def test_what_runs_out_is_told_with_the_remedy(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, remedy: str
) -> None:
    def fail(*_: Any, **__: Any) -> NoReturn:
        raise error

    monkeypatch.setattr(handler, "quantize_layer", fail)
    result = run("quantize", folder / "dense", tmp_path / "out", *QUICK, "--data", folder / "text.txt")
    assert result.exit_code == 1
    assert remedy in result.stderr
    assert "(--resume)" in result.stderr
    assert "Traceback" not in result.output


def test_fine_tuned_and_resumed_with_a_work_folder(folder: Path, tmp_path: Path) -> None:
    options = (*QUICK, "--data", folder / "text.txt", "--finetune", "--work-dir", tmp_path / "work")
    result = run("quantize", folder / "dense", tmp_path / "out", *options, "--json")
    assert result.exit_code == 0, result.output
    assert all(block["error_after"] <= block["error_before"] for block in json.loads(result.stdout)["blocks"])
    refused = run("quantize", folder / "dense", tmp_path / "again", *options)
    assert refused.exit_code != 0
    assert "--resume" in refused.stderr
    resumed = run("quantize", folder / "dense", tmp_path / "again", *options, "--resume")
    assert resumed.exit_code == 0, resumed.output
    name = "model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_bits_gives_each_layer_a_scheme_of_its_own(folder: Path, tmp_path: Path) -> None:
    options = ("--bits", "6", "--schemes", "1x4g8,2x4g8,4x4g8", "--nsamples", "4", "--seqlen", "64", "--json")
    result = run("quantize", folder / "dense", tmp_path / "out", *options, "--data", folder / "text.txt")
    assert result.exit_code == 0, result.output
    assert "bits a weight (at most 6)" in result.stderr
    layers = json.loads(result.stdout)["layers"]
    assert len(layers) == 14
    assert sum(layer["bits_per_weight"] * math.prod(layer["shape"]) for layer in layers) <= 6 * sum(
        math.prod(layer["shape"]) for layer in layers
    )
    assert len({layer["scheme"] for layer in layers}) > 1
    model, _ = load_model(find_model(tmp_path / "out"))
    assert {layer["scheme"] for layer in layers} == {
        str(parameter.scheme) for parameter in model.parameters() if isinstance(parameter, AQLMTensor)
    }
    allocation = json.loads((tmp_path / "out" / "allocation.json").read_text(encoding="utf-8"))
    assert allocation["bits_per_weight"] <= allocation["budget"] == 6
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "what was prepared is gone at the end"


def test_what_was_prepared_is_kept_for_resume(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--bits", "6", "--schemes", "1x4g8,2x4g8", "--nsamples", "4", "--seqlen", "64", "--data", "generated")
    with monkeypatch.context() as broken:
        broken.setattr(quantize_command, "save_model", _disk_full)
        assert run("quantize", folder / "dense", tmp_path / "out", *options).exit_code == 1
    assert (tmp_path / "out.work.prepared.safetensors").is_file()
    monkeypatch.setattr("aqlm_tensor.cli.prepare.calibration_data", _not_again)
    monkeypatch.setattr("aqlm_tensor.cli.prepare.allocate", _not_again)
    other = run("quantize", folder / "dense", tmp_path / "out", *options, "--resume", "--seed", "3")
    assert other.exit_code == 2
    assert "was made with other options" in other.stderr
    result = run("quantize", folder / "dense", tmp_path / "out", *options, "--resume")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text(encoding="utf-8"))
    assert report["data"]["origin"]["kind"] == "generated"


def _disk_full(*_arguments: Any, **_options: Any) -> NoReturn:
    raise OSError(28, "No space left on device")


def _not_again(*_arguments: Any, **_options: Any) -> NoReturn:
    raise AssertionError("was prepared before")


def test_without_data_it_says_so_and_works(folder: Path, tmp_path: Path) -> None:
    result = run("quantize", folder / "dense", tmp_path / "out", "--scheme", "2x4g8")
    assert result.exit_code == 0, result.output
    assert "without calibration" in result.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_full_disk_is_found_before_the_work(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))  # pyright: ignore
    monkeypatch.setattr(quantize_command, "quantize_with_bar", _forbidden)
    result = run("quantize", folder / "dense", tmp_path / "out", *QUICK, "--data", folder / "text.txt")
    assert result.exit_code == 1
    assert "not enough space" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["out", "work"])
def test_folders_that_cannot_be_written_are_told_first(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    closed = tmp_path / "closed"  # rights would not stop root
    monkeypatch.setattr(arguments.os, "access", lambda path, _: path != closed)
    closed.mkdir()
    where = {"out": tmp_path / "out", "work": tmp_path / "work"} | {place: closed / place}
    options = ("--data", folder / "text.txt", "--work-dir", where["work"])
    result = run("quantize", folder / "dense", where["out"], *QUICK, *options)
    assert result.exit_code == 2
    assert f"{closed} is read-only for you" in result.stderr
    assert "loading" not in result.stderr


def test_space_is_counted_for_what_is_kept_as_well(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(file.stat().st_size for file in (folder / "quantized").glob("*.safetensors"))
    free = 3 * size // 2  # enough for the result alone
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(free, 0, free))  # pyright: ignore
    result = run("quantize", folder / "dense", tmp_path / "out", *QUICK, "--data", folder / "text.txt")
    assert result.exit_code == 1
    assert f"{tmp_path / 'out'} and {tmp_path / 'out.work'} take" in result.stderr


def _forbidden(*_: Any, **__: Any) -> NoReturn:
    raise AssertionError("must not be reached")


@pytest.mark.parametrize("when", ["quantize_with_bar", "save_pretrained"])
def test_interruption_leaves_no_half_checkpoint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    def interrupt(*_: Any, **__: Any) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(quantize_command if when == "quantize_with_bar" else PreTrainedTokenizerBase, when, interrupt)
    result = run("quantize", folder / "dense", tmp_path / "out", *QUICK, "--data", folder / "text.txt")
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ([] if when == "quantize_with_bar" else ["out.work"])


def test_force_replaces_a_checkpoint_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    arguments = ("quantize", folder / "dense", tmp_path / "out", *QUICK, "--data", folder / "text.txt", "--force")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary.txt").write_text("mine", encoding="utf-8")
    refused = run(*arguments)
    assert refused.exit_code == 2
    assert (tmp_path / "out" / "diary.txt").read_text(encoding="utf-8") == "mine"
    (tmp_path / "out" / "diary.txt").rename(tmp_path / "out" / "config.json")
    assert run(*arguments).exit_code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["model_type"] == "llama"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
