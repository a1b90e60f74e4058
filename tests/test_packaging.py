"""The wheel: what it contains, and that it works alone, away from the repository."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]

PROGRAM = """
import sys, pathlib, torch, aqlm_tensor
from torch.nn import functional as F
from aqlm_tensor import AQLMTensor
from aqlm_tensor.kernels import registry
import aqlm_tensor.integrations
home = pathlib.Path(sys.argv[1])
for module in (aqlm_tensor, registry, aqlm_tensor.integrations):
    assert home in pathlib.Path(module.__file__).parents, module.__file__
codes = torch.randint(-128, 128, (32, 8, 2), dtype=torch.int8)
w = AQLMTensor(codes, torch.randn(2, 256, 1, 8), torch.rand(32, 1, 1, 1))
x = torch.randn(3, 64)
with registry.force_kernel("torch"):
    dense = w.dequantize()
torch.testing.assert_close(F.linear(x, w), x @ dense.t(), rtol=1e-4, atol=1e-4)
print(aqlm_tensor.__version__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, with the setuptools at hand."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(REPOSITORY / name, source)
    for folder in ("aqlm_tensor", "kernels", "integrations"):
        shutil.copytree(REPOSITORY / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(
        [sys.executable, "-P", "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, source],
        check=True,
        capture_output=True,
        timeout=300,
        cwd=out,
    )
    (built,) = out.glob("*.whl")
    return built


def test_contents(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {"aqlm_tensor/py.typed"}
    for folder, package in (
        ("aqlm_tensor", "aqlm_tensor"),
        ("kernels", "aqlm_tensor/kernels"),
        ("integrations", "aqlm_tensor/integrations"),
    ):
        for pattern in ("*.py", "*.cu", "*.cuh"):
            for path in (REPOSITORY / folder).rglob(pattern):
                expected.add(f"{package}/{path.relative_to(REPOSITORY / folder).as_posix()}")
    assert expected <= names, sorted(expected - names)
    surplus = {name for name in names - expected if ".dist-info/" not in name and not name.endswith(".json")}
    assert not surplus
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"aqlm_tensor"}
    licenses = {Path(name).name for name in names if "/licenses/" in name}
    assert licenses == {"LICENSE", "NOTICE"}


def test_works_away_from_the_repository(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    pip = [
        sys.executable,
        "-P",
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        target,
        wheel,
    ]
    subprocess.run(pip, check=True, capture_output=True, timeout=300, cwd=tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(target), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM, target],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] in wheel.name
