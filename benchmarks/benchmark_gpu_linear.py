"""How fast is x @ W.T on an NVIDIA GPU: this library's kernels, dense cuBLAS, and others' low-bit kernels, in one run.

    python -P benchmarks/benchmark_gpu_linear.py
    python -P benchmarks/benchmark_gpu_linear.py --shapes 8192x28672 --schemes 2x8g8 --rows 1 4 64

Each candidate is a CUDA graph of one call for each of a rotation of random weights larger than the L2 cache; graphs are
replayed in turn, and the median time of a call is reported. Every output is first compared with the float64 product of
what its weight stands for. The kernel of this library that is chosen is a candidate, with --every-kernel all that can
run the case. Competitors are those of providers/ that are installed, those of 4 bits beside 2x8g8; gemlite, which tunes
itself for each shape and number of rows, if --gemlite names its bits.

The limit is the time that the stored weight, x and the output take at the rate of a device copy measured in this run,
or the multiplications at that of a large cuBLAS product, whichever is longer. Writes a CSV file and a plot to
benchmarks/results/.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from aqlm_tensor.codes import codes_to_indices
from aqlm_tensor.kernels import int8_codebooks, registry
from aqlm_tensor.scheme import AQLMScheme

sys.path.insert(0, str(Path(__file__).parent))  # `python -P` leaves it out; the repository's root must stay out
from harness import RESULTS, Timing, copies_to_exceed_cache, gpu_clocks, provenance, time_in_turn, write_csv
from plots import plot_gpu_linear
from providers.gemlite_products import gemlite_product, gemlite_weights
from providers.gpu import Parts, Provided, int4_weights, official, pytorch_int4

SHAPES = ("4096x4096", "4096x14336", "8192x28672", "28672x8192")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)
FEWER_ROWS = (1, 4, 16, 64, 512, 2048)
CASES: dict[str, tuple[Sequence[str], Sequence[int]]] = {  # what runs unless the command line says otherwise
    "2x8g8": (SHAPES, ROWS),
    "1x16g8": (SHAPES, FEWER_ROWS),
    "1x8g8": (["8192x28672"], FEWER_ROWS),
    "4x8g8": (["8192x28672"], FEWER_ROWS),
    "1x16g16": (["8192x28672"], FEWER_ROWS),
    "8x8g32": (["8192x28672"], FEWER_ROWS),
    "2x12g8": (["8192x28672"], FEWER_ROWS),
}
WRONG = {torch.float16: 1e-3, torch.bfloat16: 4e-3}


def random_parts(scheme: AQLMScheme, out_features: int, in_features: int, dtype: torch.dtype) -> Parts:
    """codes, codebooks and scales, drawn on the GPU."""
    info = torch.iinfo(scheme.codes_dtype)
    shape = scheme.codes_shape(out_features, in_features)
    codes = torch.randint(info.min, info.max + 1, shape, dtype=scheme.codes_dtype, device="cuda")
    codebooks = torch.randn(scheme.codebooks_shape, device="cuda").to(dtype)
    return codes, codebooks, torch.rand(shape[0], 1, 1, 1, device="cuda").add(0.5).to(dtype)


def exact_weight(parts: Parts) -> Tensor:
    """The weight in float64."""
    codes, codebooks, scales = parts
    indices = codes_to_indices(codes, codebooks.shape[1].bit_length() - 1)
    weight = torch.zeros(*codes.shape[:2], codebooks.shape[-1], dtype=torch.float64, device="cuda")
    for c in range(codes.shape[2]):
        weight += codebooks[c, indices[..., c], 0].double()
    return weight.flatten(1) * scales.double().view(-1, 1)


@dataclass(frozen=True)
class Case:
    """One layer.

    Attributes:
        scheme: of the quantized weight.
        in_features: columns.
        out_features: rows.
        dtype: of x.
    """

    scheme: AQLMScheme
    in_features: int
    out_features: int
    dtype: torch.dtype

    def problem(self, rows: int) -> registry.Problem:
        """What the registry is asked."""
        sizes = (rows, self.in_features, self.out_features, 1)
        return registry.Problem("linear", self.scheme, *sizes, self.dtype, torch.device("cuda", 0))


@dataclass(frozen=True)
class Limits:
    """Bytes per second of a device copy, read and written, and multiply-adds per second of a large product."""

    bytes_moved: float
    multiply_adds: float

    @classmethod
    def measure(cls, dtype: torch.dtype) -> "Limits":
        """The rates of this GPU now."""
        source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
        target = torch.empty_like(source)
        square = torch.randn(8192, 8192, device="cuda", dtype=dtype)
        copies = [event_seconds(lambda _: target.copy_(source), 0) for _ in range(7)]
        products = [event_seconds(lambda _: square @ square, 0) for _ in range(7)]
        return cls(2 * source.nbytes / sorted(copies)[3], 8192**3 / sorted(products)[3])

    def seconds(self, case: Case, rows: int, stored: int) -> float:
        """The least time a product can take whose weight occupies so many bytes."""
        moved = stored + rows * (case.in_features + case.out_features) * case.dtype.itemsize
        return max(moved / self.bytes_moved, rows * case.in_features * case.out_features / self.multiply_adds)


def replay(call: Callable[[int], Any], copies: int) -> Callable[[int], None]:
    """A CUDA graph of call(0), call(1), ..., as a candidate."""
    warm = torch.cuda.Stream()
    with torch.cuda.stream(warm):
        for copy in range(copies):
            call(copy)  # compiles, loads, sets attributes, and makes what is kept for each weight
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for copy in range(copies):
            call(copy)
    return lambda _: graph.replay()


def event_seconds(call: Callable[[int], Any], index: int) -> float:
    """Time on the GPU between two events around one call."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call(index)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def ours(case: Case, parts: list[Parts], x: Tensor, every: bool) -> dict[str, Provided]:
    """The kernel that is chosen, its name marked; those of options, with them; if `every`, all others that can run."""
    problem = case.problem(x.shape[0])
    chosen = next(kernel.name for kernel, reason in registry.explain(problem) if reason is None)
    stored = sum(part.nbytes for part in parts[0])
    found = {}
    for kernel in registry.KERNELS:
        if kernel.name == chosen or ((every or kernel.option) and kernel.fast and kernel.why_not(problem) is None):
            linear = kernel.function("linear")
            note = "chosen" if kernel.name == chosen else kernel.option
            name = f"{kernel.name} ({note})" if note else kernel.name
            weight = rounded_weight(parts[0]) if kernel.option == "int8_codebooks" else parts[0]
            found[name] = Provided(lambda i, linear=linear: linear(x, *parts[i], None), len(parts), weight, stored)
    return found


def rounded_weight(parts: Parts) -> Tensor:
    """The weight in float64 that the option `int8_codebooks` multiplies with."""
    codes, codebooks, scales = parts
    return exact_weight((codes, int8_codebooks.restored(int8_codebooks.quantized(codebooks))[0], scales))


def measure(case: Case, rows: tuple[int, ...], limits: Limits, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One result row for each candidate and number of rows of x."""
    inner, out, dtype = case.in_features, case.out_features, case.dtype
    l2_bytes = torch.cuda.get_device_properties("cuda").L2_cache_size
    stored = int(out * inner * case.scheme.bits_per_weight(out, inner) / 8)
    copies = max(2, copies_to_exceed_cache(stored, l2_bytes))
    parts = [random_parts(case.scheme, out, inner, dtype) for _ in range(copies)]
    dense_copies = max(2, copies_to_exceed_cache(2 * out * inner, l2_bytes))
    dense = [torch.randn(out, inner, device="cuda", dtype=dtype) for _ in range(dense_copies)]
    compared = str(case.scheme) == "2x8g8"
    int4 = int4_weights(dense) if compared else []
    tuned = {bits: gemlite_weights(dense[0], bits, copies) for bits in arguments.gemlite if compared}
    weight = exact_weight(parts[0])
    results = []
    for tokens in rows:
        x = torch.randn(tokens, inner, device="cuda", dtype=dtype)
        candidates = {"cuBLAS": Provided(lambda i, x=x: F.linear(x, dense[i]), len(dense), dense[0])}
        candidates |= ours(case, parts, x, arguments.every_kernel) | official(parts, x) | pytorch_int4(int4, x)
        for bits, layers in tuned.items():
            candidates |= gemlite_product(layers, bits, x)
        calls = {name: replay(provided.call, provided.copies) for name, provided in candidates.items()}
        exact = x.double() @ weight.T
        errors = {}
        for name, provided in candidates.items():
            reference = x.double() @ provided.weight.double().T if isinstance(provided.weight, Tensor) else exact
            errors[name] = float((provided.call(0).double() - reference).norm() / reference.norm())
        times = time_in_turn(calls, seconds=arguments.seconds, rounds=(9, 31), timer=event_seconds)
        dense_ms = times["cuBLAS"].p50 / len(dense)
        for name, provided in candidates.items():
            limit = 1e3 * limits.seconds(case, tokens, provided.nbytes)
            timing = times[name].of_one(provided.copies)
            results.append(row(case, tokens, name, timing, limit, dense_ms, errors[name]))
    clocks = gpu_clocks()  # takes long: once
    return [result | {"clocks": clocks} for result in results]


def row(
    case: Case, tokens: int, name: str, timing: Timing, limit_ms: float, dense_ms: float, error: float
) -> dict[str, Any]:
    """One line of the CSV file; microseconds."""
    return {
        "shape": f"{case.in_features}x{case.out_features}",
        "scheme": str(case.scheme),
        "dtype": str(case.dtype).removeprefix("torch."),
        "rows": tokens,
        "kernel": name,
        "us_p20": round(1e3 * timing.p20, 2),
        "us_p50": round(1e3 * timing.p50, 2),
        "us_p80": round(1e3 * timing.p80, 2),
        "dense_time_over_this": round(dense_ms / timing.p50, 2),
        "percent_of_limit": round(100 * limit_ms / timing.p50),
        "relative_error": float(f"{error:.2e}"),
        "right": error < WRONG[case.dtype],
    }


def main() -> None:
    """Run the benchmark named by the command line."""
    parser = argparse.ArgumentParser(description="AQLM linear layers on an NVIDIA GPU")
    parser.add_argument("--shapes", nargs="+", help="in_features x out_features")
    parser.add_argument("--schemes", nargs="+", default=list(CASES))
    parser.add_argument("--rows", nargs="+", type=int)
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="bfloat16")
    parser.add_argument("--seconds", type=float, default=0.2, help="per shape, scheme and number of rows")
    parser.add_argument("--every-kernel", action="store_true", help="time not only the kernel that is chosen")
    parser.add_argument("--gemlite", nargs="*", type=int, default=[], help="bits of gemlite's weights, which it tunes")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu_linear.csv")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device is available to torch")
    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    limits = Limits.measure(dtype)
    packages = ["torch", "aqlm-tensor", *(["aqlm"] if importlib.util.find_spec("aqlm") else [])]
    origin = provenance(packages) | {
        "copy_TB_per_s": f"{limits.bytes_moved / 1e12:.2f}",
        "product_TFLOP_per_s": f"{2 * limits.multiply_adds / 1e12:.0f}",
    }
    results: list[dict[str, Any]] = []
    with Progress(disable=not sys.stderr.isatty()) as progress:
        for scheme in progress.track(arguments.schemes):
            shapes, rows = CASES.get(scheme, (SHAPES, ROWS))
            for shape in arguments.shapes or shapes:
                inner, out = map(int, shape.split("x"))
                case = Case(AQLMScheme.parse(scheme), inner, out, dtype)
                results += measure(case, tuple(arguments.rows or rows), limits, arguments)
                torch.cuda.empty_cache()
                write_csv(arguments.output, results, origin)
    plot_gpu_linear(arguments.output, arguments.output.with_suffix(".png"))
    table = Table("shape", "scheme", "rows", "kernel", "us", "dense time / its time", "% of limit", "error")
    for line in results:
        columns = ("shape", "scheme", "rows", "kernel", "us_p50", "dense_time_over_this", "percent_of_limit")
        values = (line[key] for key in columns)
        table.add_row(
            *(str(value) for value in values), str(line["relative_error"]) + ("" if line["right"] else " WRONG")
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
