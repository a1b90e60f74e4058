"""What `aqlm-tensor quantize` does before it quantizes: calibration data of any kind, and a scheme for each layer.

Where the model writes its data or its layers' sensitivity is measured, that takes time and on a GPU need not come out
the same twice. So the result is kept beside the work folder until the end, for --resume.
"""

import contextlib
import functools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from aqlm_tensor.calibration.allocation import Allocation, Choice, LayerGroup
from aqlm_tensor.calibration.sensitivity import allocate
from aqlm_tensor.calibration.sources import CalibrationData, Source, calibration_data, windows_written
from aqlm_tensor.checkpoint_io import flush, write_file
from aqlm_tensor.cli.output import UsageError, bar, note, phase, usage
from aqlm_tensor.config import AQLMWeightConfig

__all__ = ["Kept", "Prepared", "Wanted", "moved", "prepare"]


@dataclass(frozen=True)
class Wanted:
    """What the user asked for.

    Attributes:
        data: as written on the command line.
        nsamples: windows, at most.
        seqlen: tokens a window.
        seed: of all that is random.
        bits: a weight on average; None for one scheme.
        schemes: to choose from.
    """

    data: str
    nsamples: int
    seqlen: int
    seed: int
    bits: float | None
    schemes: tuple[str, ...]


@dataclass(frozen=True)
class Prepared:
    """What was found for it.

    Attributes:
        batches: windows of token ids [1, seqlen].
        provenance: where they came from, JSON-able.
        allocation: a scheme for each layer, if bits were asked for.
    """

    batches: list[Any]
    provenance: dict[str, Any]
    allocation: Allocation | None


class Kept:
    """The file beside a work folder that holds what was prepared."""

    def __init__(self, work: Path) -> None:
        self.path = work.with_name(work.name + ".prepared.safetensors")

    def save(self, wanted: Wanted, prepared: Prepared) -> None:
        """Keep what was prepared; the file appears complete or not at all."""
        allocation = None if prepared.allocation is None else asdict(prepared.allocation)
        found = {"data": prepared.provenance, "allocation": allocation}
        metadata = {"wanted": json.dumps(asdict(wanted)), "found": json.dumps(found)}
        temporary = self.path.with_suffix(".partial")
        temporary.parent.mkdir(parents=True, exist_ok=True)
        windows = {str(number): batch.contiguous() for number, batch in enumerate(prepared.batches)}
        write_file(windows, temporary, metadata)
        flush(temporary)
        temporary.replace(self.path)

    def load(self, wanted: Wanted) -> Prepared | None:
        """What was kept, or None if there is nothing.

        Raises:
            UsageError: if something else was asked for then.
        """
        if not self.path.is_file():
            return None
        with safe_open(self.path, framework="pt") as opened:
            metadata = opened.metadata()
            if json.loads(metadata["wanted"]) != json.loads(json.dumps(asdict(wanted))):
                raise UsageError(f"{self.path} was made with other options: repeat those, or delete it")
            found = json.loads(metadata["found"])
            batches = [opened.get_tensor(str(number)) for number in range(len(list(opened.keys())))]
        return Prepared(batches, found["data"], _allocation(found["allocation"]))

    def remove(self) -> None:
        """Forget it."""
        self.path.unlink(missing_ok=True)


def _allocation(fields: dict[str, Any] | None) -> Allocation | None:
    if fields is None:
        return None
    groups = tuple(
        LayerGroup(tuple(group["fqns"]), group["weights"], tuple(Choice(**choice) for choice in group["choices"]))
        for group in fields["groups"]
    )
    return Allocation(groups, tuple(Choice(**choice) for choice in fields["chosen"]), fields["budget"])


def prepare(
    model: Any,
    tokenizer: Any,
    config: AQLMWeightConfig,
    source: Source,
    wanted: Wanted,
    *,
    device: str,
    kept: Kept | None,
    resume: bool,
) -> Prepared:
    """Calibration data and, if bits were asked for, the allocation; shown as they are made, or taken from before.

    Args:
        model: Transformers' model.
        tokenizer: its tokenizer.
        config: seed and codebook dtype.
        source: where data come from.
        wanted: the options.
        device: where the whole model runs while it writes data or is differentiated.
        kept: where to keep the result; None does not.
        resume: take what was kept.
    """
    before = kept.load(wanted) if kept is not None and resume else None
    if before is not None:
        return before
    data = _load(model, tokenizer, source, wanted, device)
    allocation = None
    if wanted.bits is not None:
        allocation = _allocate(model, config, data, wanted, device)
        note(str(allocation), style="")
    prepared = Prepared(data.batches, data.provenance, allocation)
    if kept is not None and (allocation is not None or windows_written(source, wanted.nsamples)):
        kept.save(wanted, prepared)
    return prepared


def _load(model: Any, tokenizer: Any, source: Source, wanted: Wanted, device: str) -> CalibrationData:
    read = functools.partial(
        calibration_data,
        source,
        model=model,
        tokenizer=tokenizer,
        nsamples=wanted.nsamples,
        seqlen=wanted.seqlen,
        seed=wanted.seed,
    )
    written = windows_written(source, wanted.nsamples)
    if not written:
        with usage(), phase("reading calibration data"):
            return read()
    with usage(), moved(model, device), bar("writing calibration data", written * wanted.seqlen, "tokens") as shown:
        return read(on_token=lambda done, _total: shown.update(done))


def _allocate(model: Any, config: AQLMWeightConfig, data: CalibrationData, wanted: Wanted, device: str) -> Allocation:
    assert wanted.bits is not None
    with usage(), moved(model, device), bar("measuring sensitivity", 100, "%") as shown:
        return allocate(
            model,
            config,
            data.batches,
            wanted.bits,
            wanted.schemes,
            on_progress=lambda done, total: shown.update(100 * done // total),
        )


@contextlib.contextmanager
def moved(model: Any, device: str) -> Iterator[None]:
    """Inside the block of code the whole model is on a device; afterwards it is where it was."""
    home = model.device
    try:
        if home != torch.device(device):
            model.to(device)
        yield
    finally:
        model.to(home)
