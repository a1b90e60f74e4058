"""Draw a calibration report (quantization_report.json): the error of each layer, of each block's output, the seconds.

python benchmarks/plot_report.py OUT/quantization_report.json [report.png]
"""

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

__all__ = ["plot_report"]


def plot_report(report: dict[str, Any], picture: Path) -> None:
    """Draw a report.

    Args:
        report: as `CalibrationReport.to_json` writes it.
        picture: where to, in the format that its suffix names.
    """
    import matplotlib.pyplot as plt  # an optional dependency: only who plots needs it

    errors: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    seconds: dict[int, float] = defaultdict(float)
    for layer in report["layers"]:
        number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", layer["fqn"])
        block = int(number[1]) if number else 0
        kind = re.sub(r"\.\d+$", "", layer["fqn"]).rpartition(".")[2]
        errors[kind][block].append(layer["relative_error"])
        seconds[block] += layer["seconds"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for kind, by_block in errors.items():
        blocks = sorted(by_block)
        left.plot(blocks, [sum(by_block[b]) / len(by_block[b]) for b in blocks], marker=".", label=kind)
    left.set(yscale="log", xlabel="block", ylabel="relative activation error", title="layers")
    left.legend(fontsize=7, ncols=2)
    tuned = report["blocks"]
    for name, label in (("error_before", "before fine-tuning"), ("error_after", "after")) if tuned else ():
        right.plot([block["block"] for block in tuned], [block[name] for block in tuned], marker=".", label=label)
    if tuned:
        right.set(yscale="log", ylabel="relative error of the block's output", title="fine-tuning")
        right.legend(fontsize=7)
    else:
        right.bar(list(seconds), list(seconds.values()))
        right.set(ylabel="seconds", title="solver")
    right.set(xlabel="block")
    totals = report["totals"]
    bits = f"{totals['bits_per_weight']:.3f} bits a weight" if totals["layers"] else "nothing quantized"
    figure.suptitle(f"{totals['layers']} layers, {bits}, {report['machine']['device']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def main() -> None:
    """Draw the report named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("picture", type=Path, nargs="?", help="default: beside the report, as PNG")
    arguments = parser.parse_args()
    report = json.loads(arguments.report.read_text(encoding="utf-8"))
    plot_report(report, arguments.picture or arguments.report.with_suffix(".png"))


if __name__ == "__main__":
    main()
