"""How fast is x @ W.T on an NVIDIA GPU: this library's CUDA kernels against cuBLAS on the dense weight, in one run.

    python -P benchmarks/benchmark_gpu_linear.py
    python -P benchmarks/benchmark_gpu_linear.py --shapes 8192x28672 --schemes 2x8g8 --rows 1 4 64

Each candidate is a CUDA graph of one call for each of a rotation of random weights larger than the L2 cache; graphs are
replayed in turn, and the median time of a call is reported. Every output is first compared with the float64 product.
Writes a CSV file to benchmarks/results/.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from aqlm_tensor.codes import codes_to_indices
from aqlm_tensor.kernels import cuda_dequantize, cuda_lookup, cuda_partial_sums
from aqlm_tensor.scheme import AQLMScheme

sys.path.insert(0, str(Path(__file__).parent))  # `python -P` leaves it out; the repository's root must stay out
from harness import RESULTS, Timing, copies_to_exceed_cache, provenance, time_in_turn, write_csv

SHAPES = ("4096x4096", "4096x14336", "14336x4096", "8192x28672", "28672x8192")
ROWS = (1, 2, 4, 8, 16, 32, 64)
SCHEMES = ("2x8g8", "1x8g8")
WRONG = {torch.float16: 1e-3, torch.bfloat16: 4e-3}

Parts = tuple[Tensor, Tensor, Tensor]


def random_parts(scheme: AQLMScheme, out_features: int, in_features: int, dtype: torch.dtype) -> Parts:
    """codes, codebooks and scales, drawn on the GPU."""
    shape = scheme.codes_shape(out_features, in_features)
    indices = torch.randint(-128, 128, shape, dtype=torch.int8, device="cuda")
    codebooks = torch.randn(scheme.codebooks_shape, device="cuda").to(dtype)
    return indices, codebooks, torch.rand(out_features, 1, 1, 1, device="cuda").add(0.5).to(dtype)


def exact_weight(parts: Parts) -> Tensor:
    """The weight in float64."""
    codes, codebooks, scales = parts
    indices = codes_to_indices(codes, 8)
    weight = torch.zeros(*codes.shape[:2], codebooks.shape[-1], dtype=torch.float64, device="cuda")
    for c in range(codes.shape[2]):
        weight += codebooks[c, indices[..., c], 0].double()
    return weight.flatten(1) * scales.double().view(-1, 1)


def replay(call: Callable[[int], Any], copies: int) -> tuple[Callable[[int], None], int]:
    """A CUDA graph of call(0), call(1), ..., as a candidate, and how many calls it holds."""
    warm = torch.cuda.Stream()
    with torch.cuda.stream(warm):
        call(0)  # compiles, loads and sets attributes
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for copy in range(copies):
            call(copy)
    return lambda _: graph.replay(), copies


def event_seconds(call: Callable[[int], Any], index: int) -> float:
    """Time on the GPU between two events around one call."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call(index)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def measure(shape: str, scheme: AQLMScheme, rows: tuple[int, ...], dtype: torch.dtype, seconds: float) -> list[dict]:
    """One result row for each number of rows of x."""
    in_features, out_features = (int(size) for size in shape.split("x"))
    l2_bytes = torch.cuda.get_device_properties("cuda").L2_cache_size
    bits = scheme.bits_per_weight(out_features, in_features)
    parts = [
        random_parts(scheme, out_features, in_features, dtype)
        for _ in range(max(2, copies_to_exceed_cache(int(out_features * in_features * bits / 8), l2_bytes)))
    ]
    dense_copies = max(2, copies_to_exceed_cache(2 * out_features * in_features, l2_bytes))
    dense = [torch.randn(out_features, in_features, device="cuda", dtype=dtype) for _ in range(dense_copies)]
    weight = exact_weight(parts[0])
    results = []
    for tokens in rows:
        x = torch.randn(tokens, in_features, device="cuda", dtype=dtype)
        modules = {"lookup": cuda_lookup, "decode + cuBLAS": cuda_dequantize}
        if tokens == 1:
            modules["partial sums"] = cuda_partial_sums
        calls = {"cuBLAS": replay(lambda i, x=x: F.linear(x, dense[i]), len(dense))}
        errors = {"cuBLAS": float("nan")}
        exact = x.double() @ weight.T
        for name, module in modules.items():
            y = module.linear(x, *parts[0], None)
            errors[name] = float((y.double() - exact).norm() / exact.norm())
            calls[name] = replay(lambda i, x=x, module=module: module.linear(x, *parts[i], None), len(parts))
        times = time_in_turn(
            {name: call for name, (call, _) in calls.items()}, seconds=seconds, rounds=(11, 41), timer=event_seconds
        )
        for name, timing in times.items():
            results.append(row(shape, scheme, dtype, tokens, name, timing, calls[name][1], times, calls, errors[name]))
    return results


def row(
    shape: str,
    scheme: AQLMScheme,
    dtype: torch.dtype,
    tokens: int,
    name: str,
    timing: Timing,
    copies: int,
    times: dict[str, Timing],
    calls: dict[str, tuple[Callable[[int], None], int]],
    error: float,
) -> dict[str, Any]:
    """One line of the CSV file; microseconds."""
    dense = times["cuBLAS"].p50 / calls["cuBLAS"][1]
    return {
        "shape": shape,
        "scheme": str(scheme),
        "dtype": str(dtype).removeprefix("torch."),
        "rows": tokens,
        "kernel": name,
        "us_p20": round(1e3 * timing.p20 / copies, 2),
        "us_p50": round(1e3 * timing.p50 / copies, 2),
        "us_p80": round(1e3 * timing.p80 / copies, 2),
        "dense_time_over_this": round(dense / (timing.p50 / copies), 2),
        "relative_error": float(f"{error:.2e}"),
        "right": name == "cuBLAS" or error < WRONG[dtype],
    }


def main() -> None:
    """Run the benchmark named by the command line."""
    parser = argparse.ArgumentParser(description="AQLM linear layers on an NVIDIA GPU")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="in_features x out_features")
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="bfloat16")
    parser.add_argument("--seconds", type=float, default=0.2, help="per shape, scheme and number of rows")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu_linear.csv")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device is available to torch")
    torch.manual_seed(0)
    results: list[dict[str, Any]] = []
    with Progress(disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("shapes", total=len(arguments.shapes) * len(arguments.schemes))
        for shape in arguments.shapes:
            for scheme in arguments.schemes:
                results += measure(
                    shape,
                    AQLMScheme.parse(scheme),
                    tuple(arguments.rows),
                    getattr(torch, arguments.dtype),
                    arguments.seconds,
                )
                torch.cuda.empty_cache()
                progress.advance(task)
    write_csv(arguments.output, results, provenance(["torch", "aqlm-tensor"]))
    table = Table("shape", "scheme", "rows", "kernel", "us", "dense time / its time", "error")
    for line in results:
        values = (line[key] for key in ("shape", "scheme", "rows", "kernel", "us_p50", "dense_time_over_this"))
        table.add_row(
            *(str(value) for value in values), str(line["relative_error"]) + ("" if line["right"] else " WRONG")
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
