"""The command line: each command on a tiny model, what bad input gets, and that --help is quick."""

import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from typer.testing import CliRunner, Result

from aqlm_tensor import AQLMTensor, handler
from aqlm_tensor.cli import quantize as quantize_command
from aqlm_tensor.cli.app import app
from aqlm_tensor.evaluate import perplexity
from aqlm_tensor.hf_model import find_model, load_model, tokenize
from tests.tiny_llama import TEXT, write_dense

QUICK = ["--scheme", "2x4g8", "--nsamples", "4", "--seqlen", "64"]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def _no_lasting_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command sets for its process must not reach other tests."""
    monkeypatch.setattr("aqlm_tensor.cli.output._quiet_libraries", lambda: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `dense`, `quantized`, `text.txt`, and `tokens.npy` that the model lacks."""
    root = tmp_path_factory.mktemp("cli")
    write_dense(root / "dense")
    (root / "text.txt").write_text(TEXT, encoding="utf-8")
    np.save(root / "tokens.npy", np.arange(500))
    result = run("quantize", root / "dense", root / "quantized", *QUICK, "--data", root / "text.txt")
    assert result.exit_code == 0, result.output
    return root


def test_help_is_quick_and_loads_no_torch() -> None:
    code = (
        "import sys; from aqlm_tensor.cli.app import app; app(['--help'], standalone_mode=False); "
        "print('torch' in sys.modules)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.splitlines()[-1] == "False"
    assert all(name in done.stdout for name in ("quantize", "eval", "generate", "inspect", "kernels"))
    # processor time, so that a busy machine does not fail it
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


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


def test_eval_prints_the_perplexity_of_the_function_last(folder: Path) -> None:
    result = run("eval", folder / "quantized", "--data", folder / "text.txt", "--seqlen", "100")
    assert result.exit_code == 0, result.output
    model, tokenizer = load_model(find_model(folder / "quantized"))
    expected = perplexity(model, tokenize(tokenizer, TEXT), 100)
    assert result.stdout.splitlines()[-1] == f"perplexity: {expected.perplexity:.4f}"
    as_json = run("eval", folder / "quantized", "--data", folder / "text.txt", "--seqlen", "100", "--json")
    report = json.loads(as_json.stdout)
    assert report["perplexity"] == expected.perplexity
    assert (report["windows"], report["predicted"], report["dropped"]) == (7, 7 * 99, 0)


def test_eval_of_the_dense_model_equals_transformers_loss(folder: Path) -> None:
    result = run("eval", folder / "dense", "--data", folder / "text.txt", "--seqlen", "50", "--json")
    model, tokenizer = load_model(find_model(folder / "dense"))
    tokens = tokenize(tokenizer, TEXT).view(-1, 50)
    with torch.no_grad():
        loss = model(tokens, labels=tokens).loss
    assert json.loads(result.stdout)["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-4)


def test_generate_answers_greedily(folder: Path) -> None:
    arguments = ("generate", folder / "quantized", "--prompt", "the cat sat", "--max-new-tokens", "8")
    report = json.loads(run(*arguments, "--json").stdout)
    assert 1 <= report["tokens"] <= 8
    assert report["prompt_tokens"] == 3
    streamed = run(*arguments)
    assert streamed.exit_code == 0
    assert streamed.stdout.split() == report["text"].split()
    assert "tokens/s" in streamed.stderr


def test_inspect_lists_layers_and_totals(folder: Path) -> None:
    result = run("inspect", folder / "quantized")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    row = next(line for line in lines if line.startswith("model.layers.1.mlp.down_proj.weight "))
    assert row.split()[1:4] == ["64x128", "2x4g8", "float32"]
    report = json.loads(run("inspect", folder / "quantized", "--json").stdout)
    assert report["totals"]["2x4g8"]["tensors"] == 14
    stored = (folder / "quantized" / "model.safetensors").stat().st_size
    assert 0 < stored - report["totals"]["all"]["bytes"] < 8192  # the header


def test_kernels_names_one_that_runs_and_why_not_the_others() -> None:
    report = json.loads(run("kernels", "--rows", "1,64", "--scheme", "1x8", "--json").stdout)
    assert [answer["rows"] for answer in report["answers"]] == [1, 64]
    for answer in report["answers"]:
        reasons = {row["kernel"]: row["reason"] for row in answer["kernels"]}
        assert reasons[answer["chosen"]] is None
    lines = run("kernels", "--rows", "1", "--explain").stdout.splitlines()
    assert sum(line.endswith(": runs") for line in lines) == 1
    assert len(lines) == 2 + len(report["answers"][0]["kernels"])


BAD: dict[str, tuple[Callable[[Path], list[Any]], str]] = {
    "unknown scheme": (lambda f: ["quantize", f / "dense", f / "new", "--scheme", "2y8"], "unknown scheme '2y8'"),
    "scheme does not fit": (lambda f: ["quantize", f / "dense", f / "new", "--scheme", "1x4g48"], "not a multiple"),
    "no model": (lambda f: ["quantize", f / "nothing", f / "new"], "is not a folder"),
    "empty folder": (lambda f: ["quantize", f, f / "new"], "holds no model"),
    "quantized already": (lambda f: ["quantize", f / "quantized", f / "new"], "is quantized already"),
    "output exists": (lambda f: ["quantize", f / "dense", f / "quantized"], "exists"),
    "output is the model": (lambda f: ["quantize", f / "dense", f / "dense", "--force"], "the model's own folder"),
    "no data file": (lambda f: ["quantize", f / "dense", f / "new", "--data", f / "no.txt"], "does not exist"),
    "data is a folder": (lambda f: ["quantize", f / "dense", f / "new", "--data", f], "cannot be read"),
    "data too short": (
        lambda f: ["quantize", f / "dense", f / "new", *QUICK, "--data", f / "text.txt", "--seqlen", "5000"],
        "700 tokens, fewer than one window of 5000",
    ),
    "nothing to measure on": (lambda f: ["quantize", f / "dense", f / "new", "--bits", "2.5"], "need --data"),
    "too few bits": (
        lambda f: ["quantize", f / "dense", f / "new", "--bits", "1", "--data", f / "text.txt", "--seqlen", "64"],
        "1 bits a weight cannot be reached",
    ),
    "unknown candidate": (
        lambda f: ["quantize", f / "dense", f / "new", "--bits", "3", "--schemes", "2x8,x", "--data", f / "text.txt"],
        "unknown scheme 'x'",
    ),
    "tokens of another model": (
        lambda f: ["quantize", f / "dense", f / "new", *QUICK, "--data", f / "tokens.npy"],
        "made with another tokenizer",
    ),
    "nothing to tune on": (lambda f: ["quantize", f / "dense", f / "new", "--finetune"], "need --data"),
    "nothing to resume": (
        lambda f: ["quantize", f / "dense", f / "new", "--data", f / "text.txt", "--resume", "--no-blockwise"],
        "leave out --no-blockwise",
    ),
    "unknown place of inputs": (
        lambda f: ["quantize", f / "dense", f / "new", "--keep-inputs", "attic"],
        "choose one of device, cpu, disk",
    ),
    "unknown dtype": (lambda f: ["quantize", f / "dense", f / "new", "--dtype", "int8"], "'int8' is unknown"),
    "unknown device": (lambda f: ["quantize", f / "dense", f / "new", "--device", "abacus"], "'abacus' cannot be used"),
    "dtype of a quantized model": (
        lambda f: ["eval", f / "quantized", "--data", f / "text.txt", "--dtype", "float16"],
        "keeps its own",
    ),
    "longer than the context": (
        lambda f: ["eval", f / "dense", "--data", f / "text.txt", "--seqlen", "300"],
        "choose 2 to 256",
    ),
    "no such GGUF file": (
        lambda f: ["eval", f / "dense", "--data", f / "text.txt", "--gguf-file", "x.gguf"],
        "no file 'x.gguf'",
    ),
    "empty prompt": (lambda f: ["generate", f / "dense", "--prompt", " "], "--prompt is empty"),
    "inspect no folder": (lambda f: ["inspect", f / "nothing"], "is not a folder"),
    "kernels rows": (lambda _: ["kernels", "--rows", "1,x"], "'1,x'"),
    "kernels measure": (lambda _: ["kernels", "--measure"], "nothing to measure"),
    "kernels shape": (lambda _: ["kernels", "--in-features", "30"], "not a multiple"),
    "kernels dtype": (lambda _: ["kernels", "--dtype", "auto"], "'auto' is unknown"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_usage_is_one_line_and_code_2(folder: Path, case: str) -> None:
    arguments, message = BAD[case]
    before = sorted(folder.iterdir())
    result = run(*arguments(folder))
    assert result.exit_code == 2, result.output
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in result.output
    assert not result.stdout
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(("name", "content"), [("empty.txt", b" \n"), ("latin.txt", b"caf\xe9")])
def test_text_that_is_none(folder: Path, tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    result = run("eval", folder / "dense", "--data", tmp_path / name)
    assert result.exit_code == 2
    assert name in result.stderr


def test_several_gguf_files_and_foreign_quantization(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"several GGUF files \(a.gguf, b.gguf\): choose one"):
        find_model(tmp_path)
    assert find_model(tmp_path, "b.gguf").gguf_file == "b.gguf"
    assert find_model(tmp_path / "a.gguf").kind == "gguf"
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}', encoding="utf-8")
    with pytest.raises(ValueError, match="quantized with 'gptq'"):
        find_model(tmp_path)
    (tmp_path / "config.json").write_text("[", encoding="utf-8")
    with pytest.raises(ValueError, match="is not a JSON object"):
        find_model(tmp_path)


def test_damaged_weights_are_a_failure_without_traceback(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "quantized", tmp_path / "damaged")
    file = tmp_path / "damaged" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    result = run("eval", tmp_path / "damaged", "--data", folder / "text.txt", "--seqlen", "64")
    assert result.exit_code == 1
    assert "error: " in result.stderr
    assert "Traceback" not in result.output
    debug = run("--debug", "eval", tmp_path / "damaged", "--data", folder / "text.txt", "--seqlen", "64")
    assert debug.exit_code == 1


def test_full_disk_is_found_before_the_work(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))  # pyright: ignore
    monkeypatch.setattr(quantize_command, "quantize_with_bar", _forbidden)
    result = run("quantize", folder / "dense", tmp_path / "out", *QUICK, "--data", folder / "text.txt")
    assert result.exit_code == 1
    assert "not enough space" in result.stderr
    assert not list(tmp_path.iterdir())


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
