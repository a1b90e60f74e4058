"""The Triton kernels compile to machine code for NVIDIA GPUs, without one, and reduce only tiles of plain layout."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

# In a process of its own: where tests run without a GPU, Triton is in interpreter mode.
PROGRAM = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from aqlm_tensor.kernels import triton_kernels

ALIGNED = {"x", "codes", "books", "scales", "bias", "out", "partial", "x_stride", "stretch"}
SCHEME = {"K": 3, "SIZE": 256, "H": 1, "BO": 8, "HAS_BIAS": True, "SPLIT": False, "BLOCK": 256}

def layouts(name, arch, dtype, group):
    kernel = getattr(triton_kernels, name)
    values = SCHEME | {"G": group, "BE": group, "BG": 256 // group}
    pointers = {"codes": "*i8", "partial": "*fp32"} | dict.fromkeys(("x", "books", "scales", "bias", "out"), dtype)
    signature = {arg: "constexpr" if arg in values else pointers.get(arg, "i32") for arg in kernel.arg_names}
    constants = {arg: values[arg] for arg in kernel.arg_names if arg in values}
    aligned = {(i,): [["tt.divisibility", 16]] for i, arg in enumerate(kernel.arg_names) if arg in ALIGNED}
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32))
    assert compiled.asm["cubin"]
    text = compiled.asm["ttgir"].splitlines()
    ends = [i for i, line in enumerate(text) if "tt.reduce.return" in line]
    return [text[i + 1] for i in ends]

cases = [("decode_linear", arch, dtype, g) for arch in (80, 90) for dtype in ("*fp16", "*fp32") for g in (8, 16)]
cases += [("decode", 80, "*bf16", 8), ("finish", 90, "*bf16", 8)]
print(json.dumps([[case, layouts(*case)] for case in cases]))
"""


def test_compiles_and_reduces_plain_layouts(tmp_path: Path) -> None:
    """Triton 3.6 adds the wrong lanes where a reduced tile was reshaped, which shows as a `#linear` layout."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM], capture_output=True, text=True, env=environment, cwd="/", timeout=300
    )
    assert done.returncode == 0, done.stderr
    for case, reduced in json.loads(done.stdout.splitlines()[-1]):
        assert bool(reduced) == (case[0] == "decode_linear")
        for line in reduced:
            assert "tensor<" in line
            assert "#linear" not in line, (case, line)
