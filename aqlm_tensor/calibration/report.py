"""What `calibrate` tells: its progress while it runs, and a report that a person or a program can read afterwards.

The report holds what one needs to trust or repeat a run: the config, a fingerprint of the data, the versions, the
errors and times of every layer and block, and the memory that it took.
"""

import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch

from aqlm_tensor.api import QuantizationReport
from aqlm_tensor.handler import LayerReport

__all__ = [
    "BlockReport",
    "CalibratedLayer",
    "CalibrationReport",
    "MeasuredPerplexity",
    "Pace",
    "Phase",
    "Progress",
    "RunRecord",
    "Stopwatch",
    "versions",
]

Phase = Literal["capture", "calibrate", "quantize", "fine-tune", "propagate"]
_FORMAT = 2
_PACKAGES = ("aqlm-tensor", "torch", "torchao", "transformers", "numba", "triton")


@dataclass(frozen=True)
class Progress:
    """Where `calibrate` is.

    Attributes:
        phase: "capture" (learning what each block is called with), "calibrate" (collecting X^T X), "quantize",
            "fine-tune", or "propagate" (computing the next block's input).
        block: index of the block.
        blocks: blocks in all.
        done: layers quantized so far.
        layers: layers to quantize in all.
        layer: report of the layer that was just quantized, if one was.
        block_left: estimated seconds until the block is done; None while there is nothing to tell from.
        left: the same of the run.
    """

    phase: Phase
    block: int
    blocks: int
    done: int
    layers: int
    layer: LayerReport | None = None
    block_left: float | None = None
    left: float | None = None


@dataclass(frozen=True)
class CalibratedLayer(LayerReport):
    """One layer that `calibrate` quantized.

    Attributes:
        weight_error: |W - What|^2 / |W|^2, whatever the inputs.
    """

    weight_error: float


@dataclass(frozen=True)
class BlockReport:
    """One block that was fine-tuned.

    Attributes:
        block: its index.
        error_before: mean over held-out tokens of |output - target|^2 / |target|^2 before fine-tuning.
        error_after: the same after it.
        seconds: wall time of fine-tuning.
    """

    block: int
    error_before: float
    error_after: float
    seconds: float


@dataclass(frozen=True)
class MeasuredPerplexity:
    """What the model made of a text at some point of the run.

    Attributes:
        stage: "dense", "calibrated", or "tuned" end to end.
        blocks: quantized so far.
        perplexity: as `aqlm_tensor.evaluate.perplexity` measures it.
        seqlen: tokens of a window.
        predicted: tokens that were predicted.
    """

    stage: Literal["dense", "calibrated", "tuned"]
    blocks: int
    perplexity: float
    seqlen: int
    predicted: int


@dataclass(frozen=True)
class RunRecord:
    """What a run was made from and what it took; everything is JSON-able.

    Attributes:
        settings: the config and the options of `calibrate`.
        data: "batches", "tokens" and "sha256" of the calibration data, and its "origin" as the caller noted it.
        versions: of Python and the packages.
        machine: "system", "device" (its name) and "threads".
        resumed: whether layers were taken from a work folder; `seconds` count this run only.
        seconds: wall time by phase.
        peak_memory_bytes: "host" is the largest resident size of the process so far; on a GPU the others are the
            largest allocation of torch there by phase.
    """

    settings: dict[str, Any]
    data: dict[str, Any]
    versions: dict[str, str]
    machine: dict[str, Any]
    resumed: bool
    seconds: dict[str, float]
    peak_memory_bytes: dict[str, int]


@dataclass(frozen=True)
class CalibrationReport(QuantizationReport):
    """What `calibrate` did.

    Attributes:
        blocks: a report for each block that was fine-tuned.
        run: what the run was made from and what it took.
        perplexity: what was measured on the way, by whoever had a text.
    """

    blocks: tuple[BlockReport, ...] = ()
    run: RunRecord | None = None
    perplexity: tuple[MeasuredPerplexity, ...] = ()

    def __str__(self) -> str:
        lines = [super().__str__()]
        if self.blocks:
            before, after = (
                sum(getattr(block, name) for block in self.blocks) for name in ("error_before", "error_after")
            )
            seconds = sum(block.seconds for block in self.blocks)
            lines.append(
                f"fine-tuned {len(self.blocks)} blocks, error of their outputs {before / len(self.blocks):.3g} -> "
                f"{after / len(self.blocks):.3g} on average, in {seconds:.1f} s"
            )
        if self.perplexity:
            points = ", ".join(f"{point.perplexity:.2f} {point.stage} ({point.blocks})" for point in self.perplexity)
            lines.append(f"perplexity (with so many blocks quantized): {points}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """The whole report as one JSON document.

        Its keys are "format_version", "totals" ("layers", "weights", "bits_per_weight", "activation_error" and
        "weight_error", both weighted by the number of weights, and "layer_seconds"), "layers", "blocks", "perplexity",
        "skipped" and the fields of `RunRecord`.
        """
        return json.dumps(
            {
                "format_version": _FORMAT,
                "totals": self._totals(),
                "layers": [asdict(layer) for layer in self.layers],
                "blocks": [asdict(block) for block in self.blocks],
                "perplexity": [asdict(point) for point in self.perplexity],
                "skipped": self.skipped,
                **({} if self.run is None else asdict(self.run)),
            },
            indent=2,
        )

    @classmethod
    def from_json(cls, document: str) -> "CalibrationReport":
        """The report that `to_json` wrote.

        Raises:
            ValueError: for a document that is something else, or of another version.
        """
        found = json.loads(document)
        if not isinstance(found, dict) or found.get("format_version") != _FORMAT:
            raise ValueError("this is no report of calibrate, or one of another version")
        layers = tuple(CalibratedLayer(**{**layer, "shape": tuple(layer["shape"])}) for layer in found["layers"])
        record = {field.name: found[field.name] for field in fields(RunRecord) if field.name in found}
        return cls(
            layers,
            (),
            found["skipped"],
            tuple(BlockReport(**block) for block in found["blocks"]),
            RunRecord(**record) if record else None,
            tuple(MeasuredPerplexity(**point) for point in found["perplexity"]),
        )

    def _totals(self) -> dict[str, Any]:
        sizes = [layer.shape[0] * layer.shape[1] for layer in self.layers]
        weights = sum(sizes)

        def mean(name: str) -> float:
            return sum(size * getattr(layer, name) for size, layer in zip(sizes, self.layers, strict=True)) / weights

        means = {} if not weights else {"bits_per_weight": mean("bits_per_weight")}
        if weights:
            means |= {"activation_error": mean("relative_error"), "weight_error": mean("weight_error")}
        seconds = sum(layer.seconds for layer in self.layers)
        return {"layers": len(sizes), "weights": weights, **means, "layer_seconds": seconds}


class Pace:
    """How fast blocks are done, to tell how long the others will take.

    Once a block is done, the others are expected to take the median of such blocks; within the first, time is taken to
    be in proportion to the weights that are quantized, which leaves out fine-tuning.
    """

    def __init__(self) -> None:
        self._blocks: list[float] = []
        self.begin(0)

    def begin(self, weights: int) -> None:
        """A block of so many weights begins."""
        self._start, self._weights, self._quantized = time.perf_counter(), weights, 0

    def quantized(self, weights: int) -> None:
        """So many more of its weights are quantized."""
        self._quantized += weights

    def end(self) -> None:
        """It is done."""
        self._blocks.append(time.perf_counter() - self._start)

    def left(self, blocks: int) -> tuple[float | None, float | None]:
        """Seconds left of the block, and of the run if it has so many blocks behind this one; None if not known."""
        spent = time.perf_counter() - self._start
        if self._blocks:
            whole = statistics.median(self._blocks)
        elif 0 < self._quantized < self._weights:
            whole = spent * self._weights / self._quantized
        else:
            return None, None
        block = max(whole - spent, 0.0)
        return block, block + blocks * whole


@dataclass
class Stopwatch:
    """Wall time and peak memory of a run by phase.

    Args:
        device: whose peak allocation counts, if it is a GPU.
    """

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    allocated: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Count the time and memory inside as this phase's."""
        start = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            if self.device.type == "cuda":
                peak = torch.cuda.max_memory_allocated(self.device)
                self.allocated[name] = max(self.allocated.get(name, 0), peak)

    def record(self, settings: dict[str, Any], data: dict[str, Any], *, resumed: bool) -> RunRecord:
        """The record of a run that ends now."""
        peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)}
        name = platform.processor() or platform.machine()
        if self.device.type == "cuda":
            peak |= self.allocated
            name = torch.cuda.get_device_name(self.device)
        machine = {"system": platform.platform(), "device": name, "threads": torch.get_num_threads()}
        return RunRecord(settings, data, versions(), machine, resumed, dict(self.seconds), peak)


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that a run's results may depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
