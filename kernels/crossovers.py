"""Tables of measured crossovers: which kernel multiplies fastest with a scheme, by the weight's size and rows of x.

`aqlm_tensor.kernels.measure` makes a table for the device at hand and `store` keeps it in the user's cache folder;
`crossovers.json` beside this module holds those of devices that were measured for the library, by architecture. The
registry asks `fastest`, which only looks into these files: they are read once per process, nothing is timed, and every
process on a machine chooses alike until somebody measures again.
"""

import functools
import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from aqlm_tensor.scheme import AQLMScheme

__all__ = ["Crossovers", "Table", "cache_folder", "fastest", "forget", "load", "store", "stored_path"]

_FORMAT_VERSION = 1
_SHIPPED = Path(__file__).parent / "crossovers.json"


@dataclass(frozen=True)
class Crossovers:
    """The fastest kernels for weights of one size.

    Attributes:
        weights: out_features times in_features of the weight that was measured.
        kernels: (most rows of x, kernel name), ascending; the last also serves more rows than that.
    """

    weights: int
    kernels: tuple[tuple[int, str], ...]

    def fastest(self, rows: int) -> str:
        """The kernel for so many rows of x: costs are stairs, so that of the next larger number that was measured."""
        return next((name for most, name in self.kernels if rows <= most), self.kernels[-1][1])


@dataclass(frozen=True)
class Table:
    """What was measured on a device.

    Attributes:
        measured: when, on what and with which versions, for people.
        schemes: by scheme and bits of x's dtype, as `key` makes it, one entry for each size that was measured.
    """

    measured: str
    schemes: dict[str, tuple[Crossovers, ...]]

    @staticmethod
    def key(scheme: AQLMScheme, dtype: torch.dtype) -> str:
        """float16 and bfloat16 are alike."""
        return f"{scheme} {8 * dtype.itemsize}"

    def fastest(self, scheme: AQLMScheme, dtype: torch.dtype, weights: int, rows: int) -> str | None:
        """The kernel for the size that is nearest by ratio; None if the scheme was not measured."""
        sizes = self.schemes.get(self.key(scheme, dtype))
        if not sizes or weights < 1:
            return None
        nearest = min(sizes, key=lambda size: abs(math.log(size.weights / weights)))
        return nearest.fastest(rows)

    def to_json(self) -> dict[str, Any]:
        """As it stands in the file."""
        schemes = {
            key: [{"weights": size.weights, "kernels": [list(entry) for entry in size.kernels]} for size in sizes]
            for key, sizes in self.schemes.items()
        }
        return {"measured": self.measured, "schemes": schemes}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Table":
        """The table that `to_json` wrote."""
        schemes = {
            key: tuple(
                Crossovers(int(size["weights"]), tuple((int(most), str(name)) for most, name in size["kernels"]))
                for size in sizes
            )
            for key, sizes in value["schemes"].items()
        }
        return cls(str(value["measured"]), schemes)


def fastest(
    scheme: AQLMScheme, dtype: torch.dtype, weights: int, rows: int, device: torch.device
) -> tuple[str, str] | None:
    """The kernel that was fastest and where that was measured, for people; None if nothing that is like it was.

    Args:
        scheme: of the weight.
        dtype: of x.
        weights: out_features times in_features.
        rows: of x.
        device: where the product runs.
    """
    for name, path in _sources(device):
        table = load(path).get(name)
        found = table.fastest(scheme, dtype, weights, rows) if table is not None else None
        if table is not None and found is not None:
            return found, table.measured
    return None


def _sources(device: torch.device) -> Sequence[tuple[str, Path]]:
    """Names of a device's tables and the files they stand in, the user's own first."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return ()
    return _sources_of_cuda(device.index or 0)


@functools.cache
def _sources_of_cuda(index: int) -> tuple[tuple[str, Path], ...]:
    major, minor = torch.cuda.get_device_capability(index)
    return (torch.cuda.get_device_name(index), stored_path()), (f"sm_{major}{minor}", _SHIPPED)


@functools.cache
def load(path: Path) -> dict[str, Table]:
    """The tables of a file by device; none if there is no such file, or one of another format.

    Raises:
        ValueError: if the file cannot be understood.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return {}
    try:
        content = json.loads(text)
        if content["format_version"] != _FORMAT_VERSION:
            return {}
        return {name: Table.from_json(table) for name, table in content["tables"].items()}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): delete it, or measure again") from error


def forget() -> None:
    """Read the files again when they are asked for next."""
    load.cache_clear()
    _sources_of_cuda.cache_clear()


def store(device: torch.device, table: Table) -> Path:
    """Keep a table as the one of a device, beside what is known of other schemes and devices; returns the file."""
    path = stored_path()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    try:
        tables = dict(load(path))
    except ValueError:  # measuring again is the remedy for a damaged file
        tables = {}
    old = tables.get(name)
    schemes = {**old.schemes, **table.schemes} if old is not None else table.schemes
    tables[name] = Table(table.measured, schemes)
    content = {
        "format_version": _FORMAT_VERSION,
        "tables": {key: tables[key].to_json() for key in sorted(tables)},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        json.dump(content, file, indent=1)
    os.replace(file.name, path)  # atomic: another process sees all of it or nothing
    forget()
    return path


def stored_path() -> Path:
    """The file with the tables of this user."""
    return cache_folder() / "crossovers.json"


def cache_folder() -> Path:
    """Where compiled kernels and tables are kept: `AQLM_TENSOR_CACHE`, or `aqlm_tensor` in the user's cache folder."""
    chosen = os.environ.get("AQLM_TENSOR_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "aqlm_tensor"
