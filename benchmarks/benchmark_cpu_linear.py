"""How fast is x @ W.T on the CPU: this library against dense torch and the official AQLM kernel, in one run.

    python -P benchmarks/benchmark_cpu_linear.py                    # everything, about half an hour
    python -P benchmarks/benchmark_cpu_linear.py --shapes 4096x11008 --schemes 2x8g8 --rows 1 4 8
    python -P benchmarks/benchmark_cpu_linear.py --input-grad       # grad @ W, the backward, instead

Writes a CSV file and a plot to benchmarks/results/. Weights are random and rotated so that the last-level cache does
not hold them; every output is compared with the float64 product before anything is timed. Beside each of our times
stand the least times that the machine allows for reading the codes from memory and for the lookups (from the L1 cache)
or multiplications that the kernel makes.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from aqlm_tensor.kernels import ops
from aqlm_tensor.kernels.numba_linear import grad_method, method
from aqlm_tensor.scheme import AQLMScheme

sys.path.insert(0, str(Path(__file__).parent))  # `python -P` leaves it out; the repository's root must stay out
from harness import RESULTS, copies_to_exceed_cache, provenance, settled_seconds, time_in_turn, write_csv
from limits import Limits, measure
from plots import plot_ratios
from providers.dense import dense, dense_input_grad
from providers.official import official, official_runs
from providers.ours import ours, ours_input_grad

SHAPES = ("4096x4096", "4096x11008", "4096x14336", "11008x4096")
ROWS = (1, 2, 4, 8, 16, 64, 256)
SCHEMES = ("1x8g8", "2x8g8", "4x8g8", "8x8g32", "1x16g8")
OFFICIAL_ROWS = 16  # it takes rows one by one, so more of them tell nothing new
WRONG = 1e-3  # relative error beyond which a float32 result is called wrong; bfloat16 rounding alone gives 2e-3

Parts = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Setting:
    """One set of weights: a scheme and a shape, as quantized parts and densely."""

    scheme: AQLMScheme
    in_features: int
    out_features: int
    parts: list[Parts]
    dense: dict[torch.dtype, list[Tensor]]


def make_setting(scheme: AQLMScheme, in_features: int, out_features: int, cache_bytes: int) -> Setting:
    """Random weights, enough of each kind to exceed the cache; the first dense one is the first quantized one."""
    generator = torch.Generator().manual_seed(0)
    shape = scheme.codes_shape(out_features, in_features)
    half = scheme.codebook_size // 2
    codebooks = torch.randn(scheme.codebooks_shape, generator=generator)
    scales = torch.rand(shape[0], 1, 1, 1, generator=generator) + 0.5
    codes = torch.randint(-half, half, shape, dtype=scheme.codes_dtype, generator=generator)
    copies = copies_to_exceed_cache(codes.nbytes, cache_bytes)
    parts = [(codes.roll(i, 0), codebooks, scales) for i in range(copies)]
    weight = ops.dequantize(*parts[0])
    by_dtype = {}
    for dtype in (torch.float32, torch.bfloat16):
        copies = copies_to_exceed_cache(weight.numel() * dtype.itemsize, cache_bytes)
        by_dtype[dtype] = [weight.to(dtype, copy=True) for _ in range(copies)]
    repack = ours(parts, torch.zeros(1, in_features), torch.float32)
    for index in range(len(parts)):  # the kernel's first use of a weight costs extra, once in its life
        repack(index)
    return Setting(scheme, in_features, out_features, parts, by_dtype)


def candidates(setting: Setting, x: Tensor, threads: int, grad: bool) -> Iterator[tuple[str, Callable[[int], Tensor]]]:
    """Names and functions of everything to be timed for these rows of x, or (grad) of the output's gradient."""
    theirs, mine = (dense_input_grad, ours_input_grad) if grad else (dense, ours)
    yield "dense fp32", theirs(setting.dense[torch.float32], x, torch.float32)
    yield "dense bf16", theirs(setting.dense[torch.bfloat16], x, torch.bfloat16)
    yield "ours fp32", mine(setting.parts, x, torch.float32)
    yield "ours bf16", mine(setting.parts, x, torch.bfloat16)
    if not grad and official_runs(setting.parts[0]) and x.shape[0] <= OFFICIAL_ROWS:
        yield "official fp32", official(setting.parts, x, threads)


def limits_ms(setting: Setting, rows: int, threads: int, grad: bool, limits: Limits) -> dict[str, float]:
    """Least milliseconds for the codes' way from memory and for the lookups or multiplications of our kernel."""
    codes, codebooks, _ = setting.parts[0]
    memory = codes.nbytes / limits.bytes_read[threads]
    way = (grad_method if grad else method)(rows, codes.shape, codebooks.shape)
    if way in ("lookup", "scatter"):
        work = codes.numel() * -(-rows // 16) / limits.loads
    elif way == "gather":  # 8 floats a load
        work = codes.numel() * -(-rows // 4) * -(-codebooks.shape[-1] // 8) / limits.loads
    else:
        work = setting.in_features * setting.out_features * rows / limits.multiply_adds
    return {"limit_memory_ms": round(1e3 * memory, 3), "limit_work_ms": round(1e3 * work / threads, 3)}


def measure_case(
    setting: Setting, rows: int, threads: int, grad: bool, limits: Limits, seconds: float
) -> Iterator[dict[str, Any]]:
    """One result per candidate, for one number of rows and threads; for the backward if `grad`."""
    torch.set_num_threads(threads)
    weight = setting.dense[torch.float32][0].double()
    weight = weight.T if grad else weight
    x = torch.randn(rows, weight.shape[1], generator=torch.Generator().manual_seed(rows))
    calls = dict(candidates(setting, x, threads, grad))
    reference = x.double() @ weight.T
    errors = {}
    for name, call in calls.items():
        errors[name] = float((call(0).double() - reference).norm() / reference.norm())
        if not name.startswith("official"):
            assert errors[name] < (1e-5 if "fp32" in name else 1e-2), f"{name} is wrong: relative error {errors[name]}"
    for name, timing in time_in_turn(calls, seconds=seconds, timer=settled_seconds).items():
        wrong = name.startswith("official") and errors[name] > WRONG
        yield {
            "in_features": setting.in_features,
            "out_features": setting.out_features,
            "scheme": str(setting.scheme),
            "rows": rows,
            "threads": threads,
            "provider": name,
            "p20_ms": round(timing.p20, 4),
            "p50_ms": round(timing.p50, 4),
            "p80_ms": round(timing.p80, 4),
            "rounds": timing.rounds,
            "error": f"{errors[name]:.2e}",
            "verdict": "WRONG" if wrong else "right",
            **(limits_ms(setting, rows, threads, grad, limits) if name == "ours fp32" else dict.fromkeys(_LIMITS, "")),
        }


_LIMITS = ("limit_memory_ms", "limit_work_ms")


def show(results: list[dict[str, Any]], console: Console) -> None:
    """Print one line per case: our times, the limits, and how many times as long each peer takes."""
    table = Table("in x out", "scheme", "rows", "threads", "ours fp32 / bf16, ms", "limit, ms")
    peers = ("dense fp32", "dense bf16", "official fp32")
    for peer in peers:
        table.add_column(f"{peer} / ours", justify="right")
    cases: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in results:
        key = tuple(row[column] for column in ("in_features", "out_features", "scheme", "rows", "threads"))
        cases.setdefault(key, {})[row["provider"]] = row
    for (in_features, out_features, *rest), by_name in cases.items():
        mine = {dtype: by_name[f"ours {dtype}"]["p50_ms"] for dtype in ("fp32", "bf16")}
        limit = max(by_name["ours fp32"][column] for column in _LIMITS)
        ratios = [
            f"{by_name[peer]['p50_ms'] / mine[peer.split()[1]]:.2f}"
            + (" (wrong)" if by_name[peer]["verdict"] == "WRONG" else "")
            if peer in by_name
            else "-"
            for peer in peers
        ]
        times = f"{mine['fp32']:.2f} / {mine['bf16']:.2f}"
        table.add_row(f"{in_features}x{out_features}", *map(str, rest), times, f"{limit:.2f}", *ratios)
    console.print(table)


def main() -> None:
    """Run, show and store the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="in_features x out_features")
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--input-grad", action="store_true", help="time grad @ W instead of x @ W.T")
    parser.add_argument("--seconds", type=float, default=2.0, help="to spend on the rounds of one case")
    parser.add_argument("--cache-mb", type=int, default=64, help="weights in rotation exceed twice this many MB")
    parser.add_argument("--output", type=Path, help="CSV file; the plot goes beside it")
    options = parser.parse_args()
    console = Console(width=140)
    origin = provenance(("torch", "numba", *(["aqlm"] if importlib.util.find_spec("aqlm") else [])))
    limits = measure(tuple(options.threads))
    console.print(f"{origin['device']}; {limits}")
    output = (
        options.output or RESULTS / f"cpu_{'input_grad' if options.input_grad else 'linear'}_{origin['date'][:10]}.csv"
    )
    results: list[dict[str, Any]] = []
    with Progress(console=console) as progress:
        task = progress.add_task("", total=len(options.shapes) * len(options.schemes) * len(options.rows))
        for shape in options.shapes:
            in_features, out_features = map(int, shape.split("x"))
            for scheme in map(AQLMScheme.parse, options.schemes):
                setting = make_setting(scheme, in_features, out_features, options.cache_mb << 20)
                for rows in options.rows:
                    progress.update(task, description=f"{shape} {scheme}, {rows} rows")
                    for threads in options.threads:
                        case = measure_case(setting, rows, threads, options.input_grad, limits, options.seconds)
                        results.extend(case)
                    progress.advance(task)
                write_csv(output, results, origin)
    show(results, console)
    plot_ratios(output, output.with_suffix(".png"))
    console.print(f"written: {output} and {output.with_suffix('.png')}")


if __name__ == "__main__":
    main()
