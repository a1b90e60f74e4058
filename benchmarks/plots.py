"""Plots of benchmark results."""

import csv
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from aqlm_tensor.scheme import AQLMScheme

__all__ = ["plot_gpu_linear", "plot_quality", "plot_ratios", "smollm2_bits"]


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


def plot_gpu_linear(results: Path, picture: Path) -> None:
    """Draw dense time / its time, and percent of the limit, over rows of x, a column for each shape.

    Args:
        results: the CSV file of benchmark_gpu_linear.py.
        picture: where to write, in the format that its suffix names.
    """
    import matplotlib.pyplot as plt

    measures = ("dense_time_over_this", "percent_of_limit")
    lines: dict[str, dict[str, dict[int, dict[str, float]]]] = defaultdict(lambda: defaultdict(dict))
    device = ""
    with results.open() as file:
        for row in csv.DictReader(file):
            name = _label(row["kernel"], row["scheme"])
            if name and row["right"] == "True":
                found = lines[row["shape"]][name].setdefault(int(row["rows"]), dict.fromkeys(measures, 0.0))
                for measure in measures:  # the better of the official paths
                    found[measure] = max(found[measure], float(row[measure]))
            device = f"{row['device']}, {row['date'][:10]}"
    figure, axes = plt.subplots(
        2, len(lines), figsize=(4.5 * len(lines) + 2, 7), squeeze=False, sharex=True, layout="constrained"
    )
    # a scheme has one colour, whoever multiplies with it
    things = sorted({name.split()[-1] for by_name in lines.values() for name in by_name})
    colours = {thing: f"C{index}" for index, thing in enumerate(things)}
    handles = {}
    for column, (shape, by_name) in enumerate(lines.items()):
        for axis, measure in zip(axes[:, column], measures, strict=True):
            for name, by_rows in sorted(by_name.items()):
                rows = sorted(by_rows)
                style = _STYLES.get(name.split()[0], "-")
                values = [by_rows[m][measure] for m in rows]
                (handles[name],) = axis.plot(rows, values, style, marker=".", color=colours[name.split()[-1]])
            axis.set(xscale="log", xlabel="rows of x", ylabel=measure.replace("_", " "))
        axes[0, column].set(yscale="log", title=shape)
        axes[0, column].axhline(1, color="grey", linewidth=0.8)
    names = sorted(handles)
    figure.legend([handles[name] for name in names], names, loc="outside right upper", fontsize=8)
    figure.suptitle(device, fontsize=9)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


_STYLES = {"official": "--", "PyTorch": ":", "cuBLAS": ":", "ours,": "-."}  # by the first word


def _label(kernel: str, scheme: str) -> str | None:
    """What a line is called; None for kernels of this library that were not chosen."""
    if kernel in ("cuBLAS", "PyTorch int4"):
        return kernel
    if kernel.startswith("official"):
        return f"official {scheme}"
    if kernel.endswith("(int8_codebooks)"):
        return f"ours, int8 codebook, {scheme}"
    return f"ours {scheme}" if kernel.endswith("(chosen)") else None


def plot_quality(results: Sequence[Path], picture: Path, *, most: float = 12.0) -> None:
    """Draw perplexity over that of the dense model against bits a weight, a line for each method.

    Args:
        results: CSV files with columns method, setting, bits_per_weight and ratio ("quality_*.csv"; rows of method
            "dense" are left out), or with columns case, stage, blocks and ratio ("*calibration*.csv", of which the
            last block of each case counts). Files without any of them are passed over.
        picture: where to write, in the format that its suffix names.
        most: larger ratios stand at the upper edge, with their value.
    """
    import matplotlib.pyplot as plt

    points: dict[str, dict[float, tuple[float, str]]] = defaultdict(dict)
    for file in results:
        with file.open() as opened:
            for name, bits, ratio, setting in map(_quality_point, csv.DictReader(opened)):
                if name:
                    points[name][bits] = (ratio, setting)
    figure, axis = plt.subplots(figsize=(8, 5.2))
    for name, found in sorted(points.items()):
        bits = sorted(found)
        marker, size = ("*", 11) if len(bits) == 1 else ("o", 6)
        shown = [min(found[bit][0], most) for bit in bits]
        (line,) = axis.plot(bits, shown, label=name, marker=marker, markersize=size)
        for bit, height in zip(bits, shown, strict=True):
            ratio, setting = found[bit]
            text = f"{ratio:.3g} \u2191" if ratio > most else setting if name.startswith("ours") else ""
            offset = (4, -10) if ratio > most else (5, 4)
            axis.annotate(
                text, (bit, height), textcoords="offset points", xytext=offset, fontsize=7, color=line.get_color()
            )
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.set(yscale="log", xlabel="stored bits a weight (codebooks, scales and zero points included)")
    axis.set(ylabel="perplexity / dense", title="SmolLM2-135M-Instruct, WikiText-2, all 30 blocks quantized")
    ticks = [1, 1.2, 1.5, 2, 3, 5, 10]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def _quality_point(row: dict[str, str]) -> tuple[str | None, float, float, str]:
    """Line, bits a weight, ratio and label of a row; None for one that is not drawn."""
    nothing = (None, 0.0, 0.0, "")
    if "method" in row:
        name = _METHODS.get(row["method"])
        return (name, float(row["bits_per_weight"]), float(row["ratio"]), row["setting"]) if name else nothing
    if "case" in row and row["blocks"] == str(_BLOCKS):
        scheme, *stages = row["case"].split("+")
        tuned = {"calibrated": ", blocks fine-tuned" if "ft" in stages else "", "pv-tuned": ", fine-tuned and PV-tuned"}
        if row["stage"] in tuned:
            return f"ours{tuned[row['stage']]}", smollm2_bits(scheme), float(row["ratio"]), scheme
    return nothing


def smollm2_bits(written: str) -> float:
    """Stored bits a weight of SmolLM2-135M's blocks, floats counting 16 bits.

    Args:
        written: the scheme of all layers, or two, with a comma, for those of MLPs and the others; or bits.
    """
    if "x" not in written:
        return float(written)
    of_mlps, _, of_others = written.partition(",")
    others, mlps = [(576, 576), (192, 576), (192, 576), (576, 576)], [(1536, 576), (1536, 576), (576, 1536)]
    schemes = [of_mlps] * len(mlps) + [of_others or of_mlps] * len(others)
    stored = sum(
        AQLMScheme.parse(scheme).stored_bits(*shape) for scheme, shape in zip(schemes, mlps + others, strict=True)
    )
    return stored / sum(rows * columns for rows, columns in mlps + others)


_BLOCKS = 30  # of SmolLM2-135M
_METHODS = {
    "aqlm": "ours",
    "mixed": "ours, mixed bits",
    "rtn": "round to nearest (torchao)",
    "hqq": "HQQ",
    "gptq": "GPTQ (GPTQModel)",
    "official": "official AQLM, blocks fine-tuned (test split)",
}
