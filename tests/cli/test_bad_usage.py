"""What bad input gets: one line, exit code 2, and nothing written."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aqlm_tensor.hf_model import find_model
from tests.cli.commands import QUICK, run

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
        lambda f: [
            "quantize",
            f / "dense",
            f / "new",
            "--bits",
            "1",
            "--schemes",
            "1x4g8",
            *QUICK[2:],
            "--data",
            f / "text.txt",
        ],
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
