"""Draw a calibration report: the error of each layer, of each block's output, and the perplexity on the way."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aqlm_tensor.calibration.report import CalibrationReport
from aqlm_tensor.cli.report import by_block, by_kind, mean_error

__all__ = ["plot_report"]


def plot_report(report: CalibrationReport, picture: Path) -> None:
    """Draw a report.

    Args:
        report: of at least one layer.
        picture: where to, in the format that its suffix names.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: for a suffix that names no format.
    """
    from matplotlib.figure import Figure  # an optional dependency: only who plots needs it

    panels: list[Callable[[CalibrationReport, Any], None]] = [_layers, _blocks]
    if report.perplexity:
        panels.append(_perplexity)
    figure = Figure(figsize=(5.5 * len(panels), 4))
    for draw, axes in zip(panels, figure.subplots(1, len(panels)), strict=True):
        draw(report, axes)
        axes.legend(fontsize=7, ncols=2)
        axes.xaxis.get_major_locator().set_params(integer=True)
    device = "" if report.run is None else f", {report.run.machine['device']}"
    figure.suptitle(f"{str(report).splitlines()[0]}{device}", fontsize=9)
    figure.tight_layout()
    figure.savefig(picture, dpi=120)


def _layers(report: CalibrationReport, axes: Any) -> None:
    """The relative activation error of each kind of layer, block by block."""
    lines: dict[str, dict[int, float]] = defaultdict(dict)
    for block, layers in by_block(report.layers).items():
        for kind, found in by_kind(layers).items():
            lines[kind][block] = mean_error(found)
    for kind, errors in lines.items():
        axes.plot(list(errors), list(errors.values()), marker=".", label=kind)
    axes.set(yscale="log", xlabel="block", ylabel="relative activation error", title="layers")


def _blocks(report: CalibrationReport, axes: Any) -> None:
    """What fine-tuning gained, or the solver's seconds where there was none."""
    numbers = [block.block for block in report.blocks]
    for name, label in (("error_before", "before fine-tuning"), ("error_after", "after")) if numbers else ():
        axes.plot(numbers, [getattr(block, name) for block in report.blocks], marker=".", label=label)
    if numbers:
        axes.set(yscale="log", xlabel="block", ylabel="relative error of the block's output", title="fine-tuning")
        return
    seconds = {block: sum(layer.seconds for layer in layers) for block, layers in by_block(report.layers).items()}
    axes.bar(list(seconds), list(seconds.values()), label="of all layers of a block")
    axes.set(xlabel="block", ylabel="seconds", title="solver")


def _perplexity(report: CalibrationReport, axes: Any) -> None:
    """Perplexity against the number of blocks that were quantized when it was measured."""
    way = [point for point in report.perplexity if point.stage != "tuned"]
    axes.plot([point.blocks for point in way], [point.perplexity for point in way], marker="o", label="calibrated")
    for point in report.perplexity:
        if point.stage == "tuned":
            axes.plot(point.blocks, point.perplexity, marker="*", markersize=12, linestyle="", label="tuned")
    axes.set(
        xlabel="blocks quantized", ylabel=f"perplexity, windows of {report.perplexity[0].seqlen}", title="perplexity"
    )
