"""The commands that look at models: each on a tiny model; and that --help is quick."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aqlm_tensor.evaluate import perplexity
from aqlm_tensor.hf_model import find_model, load_model, tokenize
from tests.cli.commands import run
from tests.tiny_llama import TEXT


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


def test_version_is_what_a_bug_report_needs() -> None:
    lines = run("--version").stdout.splitlines()
    assert f"torch {torch.__version__}" in lines
    assert any(line.startswith("aqlm-tensor ") for line in lines)


def test_a_missing_library_is_named_with_its_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "transformers.utils", None)
    result = run("eval", folder / "dense", "--data", folder / "text.txt")
    assert result.exit_code == 1
    assert "transformers" in result.stderr
    assert "pip install 'aqlm-tensor[transformers]'" in result.stderr


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
