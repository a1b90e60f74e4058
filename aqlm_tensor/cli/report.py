"""What `aqlm-tensor quantize` shows of a calibration: a line for each block when it is done, a table at the end."""

import re
from collections import defaultdict
from collections.abc import Iterable

from rich.table import Table

from aqlm_tensor.calibration.report import CalibrationReport
from aqlm_tensor.handler import LayerReport

__all__ = ["block_line", "by_block", "by_kind", "error_table", "mean_error"]


def block_line(layers: Iterable[LayerReport]) -> str:
    """The errors and time of one block's layers."""
    kinds = by_kind(layers)
    errors = ", ".join(f"{kind} {mean_error(found):.4f}" for kind, found in kinds.items())
    seconds = sum(layer.seconds for found in kinds.values() for layer in found)
    return f"{errors}; {seconds:.1f} s"


def error_table(report: CalibrationReport) -> Table:
    """Relative activation error by block and kind of layer (a mean, where a block has several of a kind)."""
    tuned = {block.block: block for block in report.blocks}
    kinds = list(by_kind(report.layers))
    title = "relative activation error of each layer" + (", and of each block's output" if tuned else "")
    table = Table(title=title, title_justify="left", box=None, padding=(0, 0, 0, 1), pad_edge=False)  # in 80 columns
    for column in ("block", *(kind.removesuffix("_proj") for kind in kinds), *(("output", "tuned") if tuned else ())):
        table.add_column(column, justify="right", min_width=6)
    table.add_column("s", justify="right", min_width=5)
    for index, layers in by_block(report.layers).items():
        found = by_kind(layers)
        errors = [f"{mean_error(found[kind]):.4f}" if kind in found else "" for kind in kinds]
        block = tuned.get(index)
        before_after = [f"{block.error_before:.4f}", f"{block.error_after:.4f}"] if block else ["", ""]
        seconds = sum(layer.seconds for layer in layers) + (block.seconds if block else 0.0)
        table.add_row(str(index), *errors, *(before_after if tuned else []), f"{seconds:.1f}")
    return table


def by_block(layers: Iterable[LayerReport]) -> dict[int, list[LayerReport]]:
    """Layers by the number of their block, which is the first number in their names."""
    found: dict[int, list[LayerReport]] = defaultdict(list)
    for layer in layers:
        number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", layer.fqn)
        found[int(number[1]) if number else 0].append(layer)
    return dict(sorted(found.items()))


def by_kind(layers: Iterable[LayerReport]) -> dict[str, list[LayerReport]]:
    """Layers by the last part of their names, experts of one projection together."""
    found: dict[str, list[LayerReport]] = {}
    for layer in layers:
        found.setdefault(re.sub(r"\.\d+$", "", layer.fqn).rpartition(".")[2], []).append(layer)
    return found


def mean_error(layers: list[LayerReport]) -> float:
    """Mean relative activation error of some layers."""
    return sum(layer.relative_error for layer in layers) / len(layers)
