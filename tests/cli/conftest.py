"""A folder with a tiny model, the same quantized, and text."""

from pathlib import Path

import numpy as np
import pytest

from tests.cli.commands import QUICK, run
from tests.tiny_llama import TEXT, write_dense


@pytest.fixture(autouse=True)
def _no_lasting_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command sets for its process must not reach other tests."""
    monkeypatch.setattr("aqlm_tensor.cli.output._quiet_libraries", lambda: None)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `dense`, `quantized`, `text.txt`, and `tokens.npy` that the model lacks."""
    root = tmp_path_factory.mktemp("cli")
    write_dense(root / "dense")
    (root / "text.txt").write_text(TEXT, encoding="utf-8")
    np.save(root / "tokens.npy", np.arange(500))
    result = run("quantize", root / "dense", root / "quantized", *QUICK, "--data", root / "text.txt")
    assert result.exit_code == 0, result.output
    return root
