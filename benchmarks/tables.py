"""The tables of README.md beside this file and one of the project's, written from results/: no number is typed.

    python -P benchmarks/tables.py            # after new results; a test holds that nothing is left to be changed

Each table stands between `<!-- NAME -->` and `<!-- end -->`, NAME being a function of TABLES.
"""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # `python -P` leaves it out; the repository's root must stay out
import kernel_tables
import quality_tables
from goals import goals
from readings import LARGE, cpu_cases, linear, official, official_ratios, over, read, seconds_of_30_blocks, table

__all__ = ["READMES", "TABLES", "rendered"]

READMES = (Path(__file__).parents[1] / "README.md", Path(__file__).parent / "README.md")


def summary() -> str:
    """What the README of the project says; few digits."""
    tokens, found = (1, 4, 16, 64, 512), linear()
    ours, theirs = found["2x8g8", LARGE[0]], found["official 2x8g8", LARGE[0]]
    model = {row["candidate"]: row for row in read("nvidia_h100_*_model.csv")}
    dense, fused = model["dense"], model["2x8g8, fused"]
    step, memory = (float(fused[name]) / float(dense[name]) for name in ("compiled_step_tokens_per_s", "peak_GiB"))
    cpu = {key[2:]: over(case, "dense fp32") for key, case in cpu_cases("cpu_linear_*_2x8g8.csv").items()}
    whole, tuned = ({row[0]: float(row[place]) for row in quality_tables.pipeline_rows()} for place in (3, 5))
    seconds = official("seconds, SmolLM2")["30"], seconds_of_30_blocks()
    rows = [
        [
            f"one linear layer, H100, {_list(tokens)} tokens, 8192 x 28672",
            "dense bf16 (cuBLAS)",
            _faster(ours[m] for m in tokens),
        ],
        ["the same", "the official kernels", _faster(ours[m] / theirs[m] for m in tokens)],
        [
            "decode step of an 8B model, H100, compiled and fused",
            "dense bf16",
            f"{_faster([step])}, {memory:.2f} of the memory",
        ],
        [
            "one linear layer, 2 CPU cores, 1 / 4 / 16 / 64 tokens, 4096 x 11008",
            "dense float32",
            _faster(cpu[m, 2] for m in (1, 4, 16, 64)),
        ],
        [
            "calibrating SmolLM2-135M with fine-tuning, H100",
            "the official code",
            f"{seconds[1]:.0f} s against {seconds[0]:.0f}",
        ],
        [
            "its perplexity with all 30 blocks at 2.15 bits, then PV-tuned",
            "the dense model",
            f"{whole['2x8g8']:.2f} times, {tuned['2x8g8']:.2f} times (official {official_ratios()['30']:.2f})",
        ],
        [
            "the same with 3x8g8 (3.2 bits) and 4x8g8 (4.3 bits), PV-tuned",
            "the dense model",
            f"{tuned['3x8g8']:.2f} and {tuned['4x8g8']:.2f} times",
        ],
    ]
    return table(["2x8g8", "against", ""], rows)


def _list(numbers: Iterable[float | str]) -> str:
    return " / ".join(map(str, numbers))


def _faster(ratios: Iterable[float]) -> str:
    return f"{_list(f'{ratio:.0f}' if ratio >= 9.95 else f'{ratio:.2g}' for ratio in ratios)} times as fast"


TABLES: dict[str, Callable[[], str]] = {
    write.__name__: write
    for write in (
        summary,
        goals,
        *(getattr(kernel_tables, name) for name in kernel_tables.__all__),
        *(getattr(quality_tables, name) for name in quality_tables.__all__ if name != "pipeline_rows"),
    )
}


def rendered(text: str) -> str:
    """A text with each table that it has a place for written anew."""
    for name, write in TABLES.items():
        start, end = f"<!-- {name} -->\n", "<!-- end -->"
        before, found, rest = text.partition(start)
        if found:
            text = f"{before}{start}{write()}\n{end}{rest.partition(end)[2]}"
    return text


if __name__ == "__main__":
    for readme in READMES:
        readme.write_text(rendered(readme.read_text(encoding="utf-8")), encoding="utf-8")
