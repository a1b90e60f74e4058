"""What the Numba kernels keep: repacked codes in memory, compiled functions on disk."""

import gc
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from aqlm_tensor.kernels import numba_codes, numba_linear, registry
from aqlm_tensor.kernels.numba_lookup import lookup_linear
from tests.strategies import random_parts


def packed_bytes(codes: torch.Tensor) -> int:
    return sum(entry.data.nbytes for entry in numba_codes._cache.get(codes.untyped_storage(), {}).values())


def linear(codes: torch.Tensor, codebooks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    x = torch.randn(2, codes.shape[1] * 8, generator=torch.Generator().manual_seed(0))
    return lookup_linear(x, codes, codebooks.unsqueeze(0), scales, None)


def test_packed_once_and_freed_with_the_codes() -> None:
    codes = random_parts("2x8g8", 64, 128)[0]
    packed = weakref.ref(numba_codes.packed_codes(codes, 8))
    gc.collect()
    assert packed() is numba_codes.packed_codes(codes, 8)
    assert packed() is numba_codes.packed_codes(codes.detach().view_as(codes), 8), "another view of the same codes"
    del codes
    gc.collect()
    assert packed() is None


def test_never_more_than_the_codes() -> None:
    codes, codebooks, scales = random_parts("3x8g8", 96, 88)
    slices = [codes, codes[:32], codes[32:], codes[:, 1:], codes[::2], codes[5:90, 3:8]]
    expected = [linear(piece.clone(), codebooks, scales[: len(piece)]) for piece in slices]
    for _ in range(2):
        for piece, wanted in zip(slices, expected, strict=True):
            assert torch.equal(linear(piece, codebooks, scales[: len(piece)]), wanted)
            assert 0 < packed_bytes(codes) <= codes.nbytes


def test_in_place_changes_are_noticed() -> None:
    codes, codebooks, scales = random_parts("2x8g8", 64, 128)
    linear(codes, codebooks, scales)
    codes[3:9].fill_(1)
    assert torch.equal(linear(codes, codebooks, scales), linear(codes.clone(), codebooks, scales))
    codes[:32].copy_(codes[32:].clone())
    assert torch.equal(linear(codes, codebooks, scales), linear(codes.clone(), codebooks, scales))


def test_invalidate() -> None:
    codes, codebooks, scales = random_parts("2x8g8", 64, 128)
    before = linear(codes, codebooks, scales)
    codes.numpy()[:] = 1  # behind torch's back
    assert torch.equal(linear(codes, codebooks, scales), before), "this is what invalidate is for"
    numba_linear.invalidate(codes[4:])  # any view will do
    assert torch.equal(linear(codes, codebooks, scales), linear(codes.clone(), codebooks, scales))


def test_inference_tensors() -> None:
    with torch.inference_mode():
        codes, codebooks, scales = (part.clone() for part in random_parts("2x8g8", 64, 128))
        assert codes.is_inference()
        assert torch.equal(linear(codes, codebooks, scales), linear(codes, codebooks, scales))
        assert packed_bytes(codes) == codes.nbytes


def test_codebooks_and_scales_are_not_cached() -> None:
    codes, codebooks, scales = random_parts("2x8g8", 64, 128)
    before = linear(codes, codebooks, scales)
    codebooks.data.mul_(2)
    assert torch.allclose(linear(codes, codebooks, scales), 2 * before)


_SCRIPT = """
import aqlm_tensor.kernels.numba_sums as sums
kernel = sums.finish_kernel()
print(kernel.compiled.cache_hits, sums.__file__)
"""


def run_script(environment: dict[str, str]) -> tuple[int, str]:
    command = [sys.executable, "-P", "-B", "-c", _SCRIPT]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | environment, cwd="/")
    hits, file = ran.stdout.split()
    return int(hits), file


@pytest.mark.parametrize("writable", [True, False])
def test_second_process_does_not_compile(tmp_path: Path, writable: bool) -> None:
    """Compiled code is found again beside the source, or in the user's cache directory if that cannot be written."""
    root = Path(registry.__file__).parents[1]
    package = tmp_path / "aqlm_tensor"
    shutil.copytree(root / "aqlm_tensor", package, ignore=shutil.ignore_patterns("__pycache__"))
    ignore = shutil.ignore_patterns("__pycache__", "cuda*", "triton*")
    shutil.copytree(Path(registry.__file__).parent, package / "kernels", ignore=ignore)
    home = tmp_path / "home"
    environment = {"PYTHONPATH": str(tmp_path), "HOME": str(home), "XDG_CACHE_HOME": str(home)}
    environment["NUMBA_CACHE_DIR"] = ""
    if not writable:
        (package / "kernels" / "__pycache__").write_text("a file, so that no directory can be made here, even by root")
    hits, file = run_script(environment)
    assert Path(file).is_relative_to(tmp_path), "the installed package ran instead of the copy"
    assert hits == 0
    assert run_script(environment)[0] == 1
    assert any(home.rglob("*.nbi")) != writable
    if not writable:
        return
    vectors = package / "kernels" / "numba_vectors.py"
    vectors.write_text(vectors.read_text() + "\n# another version of what the kernel is built from\n")
    assert run_script(environment)[0] == 0, "a kernel compiled from other source was used"
