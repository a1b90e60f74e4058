"""What is in results/, read for the tables of README.md; of several files for one question the latest."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

__all__ = [
    "LARGE",
    "LAYERS",
    "Row",
    "bold",
    "calibrated",
    "cpu_cases",
    "linear",
    "official",
    "official_ratios",
    "over",
    "read",
    "read_solver",
    "seconds_of_30_blocks",
    "table",
]

RESULTS = Path(__file__).parent / "results"
LARGE = ("8192x28672", "28672x8192")
LAYERS = ("q", "k", "v", "o", "gate", "up", "down")

Row = dict[str, str]


def read(pattern: str) -> list[Row]:
    """Rows of the latest of the files that match."""
    with sorted(RESULTS.glob(pattern))[-1].open() as file:
        return list(csv.DictReader(file))


def read_solver(part: str) -> list[Row]:
    """Rows of a part of the solver's benchmark on H100 and H200, later files after earlier ones."""
    files = [*sorted(RESULTS.glob("nvidia_h200_*_solver*.csv")), *sorted(RESULTS.glob("nvidia_h100_*_solver*.csv"))]
    rows = []
    for path in files:
        with path.open() as file:
            rows += [row for row in csv.DictReader(file) if row["part"] == part]
    return rows


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  ", "| ") for line in lines)


def bold(value: float, met: bool, digits: int = 2) -> str:
    """A number, in bold if it is met."""
    return f"**{value:.{digits}f}**" if met else f"{value:.{digits}f}"


def linear() -> dict[tuple[str, str], dict[int, float]]:
    """Dense time over its time by (scheme or peer, shape) and tokens; of the official paths the better one."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for row in read("nvidia_h100_*_linear.csv"):
        kernel, name = row["kernel"], row["scheme"]
        if kernel.endswith("(int8_codebooks)"):
            name += ", int8_codebooks"
        elif kernel.startswith("official"):
            name = f"official {name}"
        elif not kernel.endswith("(chosen)"):
            name = kernel
        if name != "cuBLAS":
            by_tokens = found.setdefault((name, row["shape"]), {})
            tokens, ratio = int(row["rows"]), float(row["dense_time_over_this"])
            by_tokens[tokens] = max(ratio, by_tokens.get(tokens, 0.0))
    return found


def cpu_cases(pattern: str) -> dict[tuple[str, str, int, int], dict[str, Row]]:
    """Rows of a CPU benchmark by (shape, scheme, tokens, threads) and provider."""
    cases: dict[tuple[str, str, int, int], dict[str, Row]] = {}
    for row in read(pattern):
        shape = f"{row['in_features']}x{row['out_features']}"
        cases.setdefault((shape, row["scheme"], int(row["rows"]), int(row["threads"])), {})[row["provider"]] = row
    return cases


def over(case: dict[str, Row], peer: str) -> float:
    """Times as long as ours that a peer takes, in the same dtype."""
    return float(case[peer]["p50_ms"]) / float(case[f"ours {peer.split()[1]}"]["p50_ms"])


def calibrated(case: str, pattern: str, column: str = "ratio") -> dict[str, float]:
    """Perplexity over the dense one, or seconds, by the number of quantized blocks; the case may go on to be tuned."""
    return {
        row["blocks"]: float(row[column])
        for row in read(pattern)
        if row["stage"] == "calibrated" and row["case"] in (case, f"{case}+p", f"{case}+pv")
    }


def official(what: str) -> dict[str, float]:
    """What the official code reached, by case, in the one line of work that starts so."""
    rows = read("nvidia_h100_*_official.csv")
    return {row["case"].removesuffix(" blocks"): float(row["value"]) for row in rows if row["what"].startswith(what)}


def official_ratios() -> dict[str, float]:
    """Perplexity over dense of the official code by the number of quantized blocks."""
    found = official("perplexity")
    dense = found.pop("0")
    return {blocks: perplexity / dense for blocks, perplexity in found.items()}


def seconds_of_30_blocks() -> float:
    """Calibrating SmolLM2-135M whole, blocks fine-tuned, on an H100."""
    return calibrated("2x8g8+ft", "nvidia_h100_*_calibration.csv", "seconds")["30"]
