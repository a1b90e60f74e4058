"""Plots of benchmark results."""

import csv
from collections import defaultdict
from pathlib import Path

__all__ = ["plot_ratios"]


def plot_ratios(results: Path, picture: Path, *, peer: str = "dense fp32", ours: str = "ours fp32") -> None:
    """Draw, for every shape and number of threads in a results file, peer time / our time over rows of x.

    Args:
        results: a CSV file with columns in_features, out_features, threads, scheme, rows, provider and p50_ms.
        picture: where to write, in the format that its suffix names.
        peer: the provider to compare with.
        ours: the provider that is compared.
    """
    import matplotlib.pyplot as plt  # an optional dependency: only who plots needs it

    times: dict[tuple[str, str, str], dict[str, dict[int, dict[str, float]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(dict))
    )
    device = ""
    with results.open() as file:
        for row in csv.DictReader(file):
            place = (row["in_features"], row["out_features"], row["threads"])
            times[place][row["scheme"]][int(row["rows"])][row["provider"]] = float(row["p50_ms"])
            device = f"{row['device']}, {row['date'][:10]}"
    panels = sorted(times, key=lambda place: (int(place[0]), int(place[1]), int(place[2])))
    columns = len({place[2] for place in panels})
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5 * columns, 3.2 * lines), squeeze=False, sharex=True)
    for axis, (in_features, out_features, threads) in zip(axes.flat, panels, strict=False):
        for scheme, by_rows in times[in_features, out_features, threads].items():
            rows = sorted(row for row, found in by_rows.items() if peer in found and ours in found)
            axis.plot(rows, [by_rows[row][peer] / by_rows[row][ours] for row in rows], marker="o", label=scheme)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(xscale="log", yscale="log", title=f"{in_features} x {out_features}, {threads} thread(s)")
        axis.set(xlabel="rows of x", ylabel=f"{peer} time / our time")
    axes.flat[0].legend()
    figure.suptitle(device, fontsize=9)
    figure.tight_layout()
    figure.savefig(picture, dpi=120)
    plt.close(figure)
