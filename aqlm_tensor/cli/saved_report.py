"""The report that `aqlm-tensor quantize` leaves beside the model, and `aqlm-tensor report`, which shows it again."""

import importlib.util
from pathlib import Path

from aqlm_tensor import CalibrationReport
from aqlm_tensor.cli.output import UsageError, emit, note, stdout
from aqlm_tensor.cli.plot import plot_report
from aqlm_tensor.cli.report import error_table

__all__ = ["REPORT_NAME", "run", "write_report"]

REPORT_NAME = "quantization_report.json"
_PLOT_NAME = "quantization_report.png"


def write_report(report: CalibrationReport, out: Path) -> None:
    """Write a report as JSON into a folder and, where matplotlib is installed, as a plot."""
    (out / REPORT_NAME).write_text(report.to_json() + "\n", encoding="utf-8")
    if report.layers and importlib.util.find_spec("matplotlib") is not None:
        plot_report(report, out / _PLOT_NAME)
    else:
        note(f"for a plot install matplotlib; then: aqlm-tensor report {out} --plot {_PLOT_NAME}")


def run(path: Path, plot: Path | None, *, as_json: bool) -> None:
    """Show the report of a quantized model again; see `aqlm-tensor report --help`."""
    file = path / REPORT_NAME if path.is_dir() else path
    try:
        document = file.read_text(encoding="utf-8")
        report = CalibrationReport.from_json(document)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{file} is no report that can be read ({error}): pass a folder that `aqlm-tensor quantize --data` wrote"
        ) from None
    if plot is not None:
        if importlib.util.find_spec("matplotlib") is None:
            raise UsageError("--plot needs matplotlib: pip install matplotlib")
        plot_report(report, plot)
    if as_json:
        emit(document.rstrip())
        return
    stdout.print(error_table(report))
    emit(str(report))
    if plot is not None:
        emit(f"plot: {plot}")
