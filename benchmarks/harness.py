"""What every benchmark shares: timing of several candidates in turn, and results that say where they come from.

A ratio is only worth something if both sides ran under the same conditions. Candidates are therefore timed in turn, one
call each per round, so that drifting clocks and busy neighbours meet all of them; medians over the rounds are compared.
Every candidate gets the round's number and should use another copy of its weight each time, so that the weights in
rotation are larger than the last-level cache, as they are in a model.
"""

import csv
import datetime as dt
import importlib.metadata
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aqlm_tensor.calibration.sources import TextFile, TokenFile, parse_source
from aqlm_tensor.hf_model import tokenize

__all__ = [
    "RESULTS",
    "Timing",
    "copies_to_exceed_cache",
    "cpu_seconds",
    "gpu_clocks",
    "provenance",
    "split_text",
    "time_in_turn",
    "write_csv",
]

RESULTS = Path(__file__).parent / "results"

Call = Callable[[int], Any]
Timer = Callable[[Call, int], float]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one candidate over the rounds: 20th percentile, median, 80th percentile, number of rounds."""

    p20: float
    p50: float
    p80: float
    rounds: int

    def of_one(self, calls: int) -> "Timing":
        """The timing of one call where so many were timed together."""
        return Timing(self.p20 / calls, self.p50 / calls, self.p80 / calls, self.rounds)

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> "Timing":
        """The summary of at least two rounds."""
        p20, _, _, p80 = statistics.quantiles(milliseconds, n=5, method="inclusive")
        return cls(p20, statistics.median(milliseconds), p80, len(milliseconds))


def cpu_seconds(call: Call, index: int) -> float:
    """Wall time of one call; the timer for work on the CPU."""
    start = time.perf_counter()
    call(index)
    return time.perf_counter() - start


def settled_seconds(call: Call, index: int) -> float:
    """Wall time of the second of two calls, after a rest; the timer for threads on the CPU.

    OpenMP's threads spin for some milliseconds after their last work, and two of the candidates bring an OpenMP of
    their own: without the rest, threads of one take the cores from the next.
    """
    time.sleep(0.01)
    call(2 * index)
    return cpu_seconds(call, 2 * index + 1)


def time_in_turn(
    candidates: dict[str, Call], *, seconds: float, rounds: tuple[int, int] = (5, 50), timer: Timer = cpu_seconds
) -> dict[str, Timing]:
    """Time the candidates in turn, after one round that does not count.

    Args:
        candidates: functions of the round's number.
        seconds: when the rounds have taken so long together, no other begins.
        rounds: at least and at most so many.
        timer: measures one call, in seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for call in candidates.values():
        call(0)
    end = time.perf_counter() + seconds
    for index in range(1, rounds[1] + 1):
        for name, call in candidates.items():
            times[name].append(1e3 * timer(call, index))
        if index >= rounds[0] and time.perf_counter() > end:
            break
    return {name: Timing.of(measured) for name, measured in times.items()}


def copies_to_exceed_cache(weight_bytes: int, cache_bytes: int) -> int:
    """How many weights of that size to rotate so that each is out of the last-level cache when its turn comes."""
    return 1 if weight_bytes > 4 * cache_bytes else 2 * cache_bytes // max(1, weight_bytes) + 2


def provenance(packages: Sequence[str]) -> dict[str, str]:
    """Where a result comes from: date, commit, machine, and the versions of Python and the packages."""
    versions = {"python": platform.python_version()}
    versions |= {package: importlib.metadata.version(package) for package in packages}
    return {
        "date": dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M"),
        "commit": _commit(),
        "device": _device(),
        "versions": " ".join(f"{name}={version}" for name, version in versions.items()),
    }


def split_text(tokenizer: Any, text: Path | None) -> tuple[Tensor, Tensor]:
    """Token ids to calibrate or train on, and those of the last fifth to evaluate on; by default the texts in data/."""
    if text is None:
        folder = Path(__file__).parent / "data"
        names = ("calibration.txt", "evaluation.txt")
        first, last = (tokenize(tokenizer, (folder / name).read_text(encoding="utf-8")) for name in names)
        return first, last
    source = parse_source(text)
    assert isinstance(source, TextFile | TokenFile)
    tokens = tokenize(tokenizer, source.text) if isinstance(source, TextFile) else source.tokens.long()
    border = len(tokens) - len(tokens) // 5
    return tokens[:border], tokens[border:]


def gpu_clocks() -> str:
    """Clocks, temperature and power draw of the first GPU at this moment, as nvidia-smi reports them; read only."""
    fields = "clocks.sm,clocks.mem,temperature.gpu,power.draw"
    command = ["nvidia-smi", "--id=0", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        reported = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return "unknown"
    return reported.stdout.strip().replace(", ", " / ") or "unknown"


def write_csv(path: Path, rows: Sequence[dict[str, Any]], origin: dict[str, str]) -> None:
    """Write rows that have the same columns, each followed by where the results come from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *origin])
        writer.writeheader()
        writer.writerows(row | origin for row in rows)


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        model = f"{fields.get('model name', model)} (family {fields.get('cpu family')}, model {fields.get('model')})"
    return f"{torch.get_num_threads()} cores of {model}, {torch.backends.cpu.get_cpu_capability()}"


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return (git("rev-parse", "--short", "HEAD") or "unknown") + changed
