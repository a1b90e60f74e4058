"""Time the kernels that can run a scheme on a device, and note where they cross over.

The stored table stands in for the library's own rules on that device (`aqlm_tensor.kernels.crossovers`). Few rows, as
in a decode step that is replayed from a CUDA graph, are compared by their time on the GPU; some hundred, as in a short
prompt, by that or the host's time to start them, whichever is longer; beyond, a model's large layers keep the GPU busy,
and its time counts alone. A measurement takes about ten seconds for each scheme, and some minutes the first time, when
kernels are compiled one after another.
"""

import datetime as dt
import statistics
import time
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from aqlm_tensor.kernels import registry
from aqlm_tensor.kernels.crossovers import Crossovers, Table
from aqlm_tensor.scheme import AQLMScheme

__all__ = ["ROWS", "SHAPES", "call_seconds", "graph_seconds", "measure"]

ROWS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 1024, 2048)
SHAPES = ((1024, 1024), (2048, 2048), (4096, 4096), (14336, 4096), (28672, 8192))  # out_features, in_features
_CLEARLY = 0.97  # the kernel for fewer rows keeps its place unless another takes at most so much of its time
_REPLAYS = 7
_SHORT_PROMPT = range(65, 513)  # rows of x for which the host's time counts
_CALLS, _REPEATS = 16, 15
_MOST_COPIES = 64

Timer = Callable[[Callable[[int], Tensor], int], float]


def measure(
    schemes: Iterable[AQLMScheme],
    dtype: torch.dtype,
    device: torch.device,
    *,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    rows: Sequence[int] = ROWS,
    timer: Timer | None = None,
) -> Table:
    """Time every kernel of the registry that can run these products, for random weights.

    Args:
        schemes: to measure; those that do not fit a shape leave it out.
        dtype: of x.
        device: where.
        shapes: out_features and in_features of the weights.
        rows: of x, ascending.
        timer: gives the seconds of one call of a function of the weight's number, for so many weights; by default
            `graph_seconds` and from 65 to 512 rows `call_seconds`, for CUDA devices.

    Raises:
        ValueError: if fewer than two fast kernels can run a scheme on the device, so that there is nothing to choose.
    """
    table: dict[str, tuple[Crossovers, ...]] = {}
    for scheme in schemes:
        fitting = [shape for shape in shapes if scheme.why_not(*shape) is None]
        able = {kernel.name for shape in fitting for kernel in _able(scheme, shape, 1, dtype, device)}
        able |= {kernel.name for shape in fitting for kernel in _able(scheme, shape, max(rows), dtype, device)}
        if len(able) < 2:
            found = f"only {', '.join(able)} does" if able else "none does"
            raise ValueError(f"nothing to measure: of the fast kernels {found} {scheme} in {dtype} on {device} here")
        sizes = (_crossovers(scheme, shape, rows, dtype, device, timer) for shape in fitting)
        table[Table.key(scheme, dtype)] = tuple(sizes)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return Table(f"{dt.datetime.now(dt.UTC):%Y-%m-%d} on {name} with torch {torch.__version__}", table)


def _able(
    scheme: AQLMScheme, shape: tuple[int, int], rows: int, dtype: torch.dtype, device: torch.device
) -> list[registry.Kernel]:
    """The kernels that can run a product, but for the slow fallback and those that an option must allow."""
    problem = registry.Problem("linear", scheme, rows, shape[1], shape[0], 1, dtype, device)
    usual = (kernel for kernel in registry.KERNELS if kernel.fast and not kernel.option)
    return [kernel for kernel in usual if kernel.why_not(problem) is None]


def _crossovers(
    scheme: AQLMScheme,
    shape: tuple[int, int],
    rows: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    timer: Timer | None,
) -> Crossovers:
    weights = _random_weights(scheme, shape, dtype, device)
    chosen: list[tuple[int, str]] = []
    for count in rows:
        x = torch.randn(count, shape[1], device=device).to(dtype)
        times: dict[str, float] = {}
        seconds = timer or (call_seconds if count in _SHORT_PROMPT else graph_seconds)
        for kernel in _able(scheme, shape, count, dtype, device):
            linear = kernel.function("linear")
            times[kernel.name] = seconds(lambda i, linear=linear, x=x: linear(x, *weights[i], None), len(weights))
        best = min(times, key=lambda name: times[name])
        last = chosen[-1][1] if chosen else None
        if last in times and times[best] > _CLEARLY * times[last]:
            best = last
        if best == last:
            chosen.pop()
        chosen.append((count, best))
    return Crossovers(shape[0] * shape[1], tuple(chosen))


def _random_weights(
    scheme: AQLMScheme, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """As many weights as exceed the L2 cache, so that each is read from memory as in a model."""
    info = torch.iinfo(scheme.codes_dtype)
    codes_shape = scheme.codes_shape(*shape)

    def weight() -> tuple[Tensor, Tensor, Tensor]:
        codes = torch.randint(info.min, info.max + 1, codes_shape, dtype=scheme.codes_dtype, device=device)
        codebooks = torch.randn(scheme.codebooks_shape, device=device).to(dtype)
        return codes, codebooks, torch.rand(codes_shape[0], 1, 1, 1, device=device).add(0.5).to(dtype)

    first = weight()
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    copies = min(_MOST_COPIES, 2 + 2 * cache // first[0].nbytes)
    return [first, *(weight() for _ in range(copies - 1))]


def graph_seconds(call: Callable[[int], Tensor], copies: int) -> float:
    """Median time on the GPU of one of call(0), call(1), ..., captured together in one CUDA graph."""
    call(0)  # compiles and loads
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for copy in range(copies):
            call(copy)
    times = []
    for _ in range(_REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / copies)
    return statistics.median(times[1:])


def call_seconds(call: Callable[[int], Tensor], copies: int) -> float:
    """Time of one of call(0), call(1), ... on the GPU or on the host, which starts it, whichever is longer."""
    on_gpu = graph_seconds(call, copies)
    times = []
    for _ in range(_REPEATS):
        torch.cuda.synchronize()  # so that the host never waits for room in the stream's queue
        start = time.perf_counter()
        for index in range(_CALLS):
            call(index % copies)
        times.append((time.perf_counter() - start) / _CALLS)
    return max(on_gpu, min(times))  # the least: other processes can only make the host slower
