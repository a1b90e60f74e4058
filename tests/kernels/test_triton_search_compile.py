"""The solver's Triton kernels compile to machine code for NVIDIA GPUs, without one."""

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
import json, re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from aqlm_tensor.kernels import triton_nearest, triton_search, triton_sums

MODULES = {"_sweep_block": triton_search, "_nearest": triton_nearest, "_sum_segments": triton_sums}

INTEGERS = dict.fromkeys(("indices", "order", "column", "offsets"), "*i64") | {"tables": "*i32", "costs": "*i32"}
HALVES = {"halves": "*fp16"}
SCALARS = {"limit": "fp32"}
POINTERS = ("target", "pending", "error", "metric", "feedback", "books", "transposed", "squares", "factors", "linear",
            "changes", "values", "weights", "sums", "entries", "unit")
SWEEP = {"K": 2, "SIZE": 256, "H": 1, "G": 8, "COUPLED": True, "BR": 8, "BG": 8, "BW": 256, "CHUNK": 8}
CASES = [
    ("_sweep_block", SWEEP | {"KNOWN": True}, 90),
    ("_sweep_block", SWEEP | {"K": 3, "KNOWN": False}, 80),
    ("_nearest", {"E": 8, "BE": 8, "BN": 128, "BS": 32, "CHUNK": 4}, 90),
    ("_nearest", {"E": 64, "BE": 64, "BN": 128, "BS": 16, "CHUNK": 4}, 80),
    ("_sum_segments", {"WEIGHTED": True, "BN": 16, "BE": 64}, 90),
]

def compiled(name, values, arch):
    kernel = getattr(MODULES[name], name)
    types = dict.fromkeys(POINTERS, "*fp32") | INTEGERS | HALVES | SCALARS
    signature = {arg: "constexpr" if arg in values else types.get(arg, "i32") for arg in kernel.arg_names}
    result = triton.compile(ASTSource(kernel, signature, values), target=GPUTarget("cuda", arch, 32))
    lines = result.asm["ttgir"].splitlines()
    reduced = [lines[i + 1] for i, line in enumerate(lines) if "tt.reduce.return" in line]
    return [name, len(result.asm["cubin"]), reduced]

print(json.dumps([compiled(*case) for case in CASES]))
"""


def test_compiles_and_reduces_plain_layouts(tmp_path: Path) -> None:
    """Triton 3.6 adds the wrong lanes where a reduced tile was reshaped, which shows as a `#linear` layout."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM], capture_output=True, text=True, env=environment, cwd="/", timeout=300
    )
    assert done.returncode == 0, done.stderr
    for name, size, reduced in json.loads(done.stdout.splitlines()[-1]):
        assert size > 1000
        assert reduced, name
        assert not any("#linear" in line for line in reduced), (name, reduced)
