"""The table of README.md that says where we stand: what is required, the goal, and what was measured."""

from collections.abc import Iterable, Sequence

from readings import (
    LARGE,
    LAYERS,
    bold,
    calibrated,
    cpu_cases,
    linear,
    official,
    official_ratios,
    over,
    read,
    read_solver,
    seconds_of_30_blocks,
    table,
)

__all__ = ["LINEAR_GOALS", "goals"]

TOKENS = (1, 4, 16, 64, 512, 2048)
LINEAR_GOALS: tuple[tuple[str, Sequence[str], Sequence[int], Sequence[float], Sequence[float]], ...] = (
    # scheme, shapes, tokens, and for each of them what is required and the goal: dense time over ours
    ("2x8g8", LARGE, TOKENS, (5.0, 3.7, 3.7, 2.4, 0.75, 0.87), (6.0, 4.5, 4.5, 3.0, 1.0, 0.95)),
    ("2x8g8", ("4096x14336",), TOKENS, (3.5, 3.0, 3.0, 2.2, 0.70, 0.85), (4.5, 3.5, 3.5, 2.6, 0.9, 0.95)),
    ("1x8g8", LARGE[:1], TOKENS, (7.0, 5.5, 5.5, 2.8, 0.75, 0.87), (9.0, 6.5, 6.5, 3.5, 1.0, 0.95)),
    ("1x16g8", LARGE, TOKENS, (1.2, 1.15, 1.15, 1.0, 0.60, 0.80), (1.5, 1.4, 1.4, 1.3, 0.8, 0.9)),
    ("1x16g8, int8_codebooks", LARGE, (1, 16), (2.0, 1.8), (2.6, 2.2)),
    *((scheme, LARGE[:1], (1,), (1.0,), (2.0,)) for scheme in ("4x8g8", "8x8g32", "2x12g8")),
)


def goals() -> str:
    """Where we stand: what is required, the goal, what was measured."""
    rows = [
        _linear_goal(name, shape, tokens, required, wanted)
        for name, shapes, tokens, required, wanted in LINEAR_GOALS
        for shape in shapes
    ]
    return table(["", "required", "goal", "measured", ""], [*rows, *_model_goals(), *_cpu_goals(), *_solver_goals()])


def _linear_goal(
    name: str, shape: str, tokens: Sequence[int], required: Sequence[float], wanted: Sequence[float]
) -> list[str]:
    ratios = [linear()[name, shape][m] for m in tokens]
    missed = [
        f"{m} by {100 * (1 - ratio / need):.0f} %"
        for m, ratio, need in zip(tokens, ratios, required, strict=True)
        if ratio < need
    ]
    reached = [str(m) for m, ratio, goal in zip(tokens, ratios, wanted, strict=True) if ratio >= goal]
    verdict = f"missed at {', '.join(missed)}" if missed else "met"
    counts = f"{' / '.join(map(str, tokens))} token{'s' if len(tokens) > 1 else ''}"
    return [
        f"H100, {name}, {shape}, {counts}: times dense bf16",
        " / ".join(f"{need:g}" for need in required),
        " / ".join(f"{goal:g}" for goal in wanted),
        " / ".join(bold(ratio, ratio >= need) for ratio, need in zip(ratios, required, strict=True)),
        f"{verdict}; goal reached at {', '.join(reached)}" if reached else verdict,
    ]


def _line(what: str, need: str, measured: str, met: bool, goal: str = "") -> list[str]:
    return [what, need, goal, f"**{measured}**" if met else measured, "met" if met else "missed"]


def _model_goals() -> Iterable[list[str]]:
    found = {row["candidate"]: row for row in read("nvidia_h100_*_model.csv")}
    dense = found["dense"]
    for scheme, step in (("2x8g8", 2.5), ("1x16g8", 1.15)):
        row = found[f"{scheme}, fused"]
        ratio = {name: float(row[name]) / float(dense[name]) for name in row if row[name] and name.endswith(_UNITS)}
        speed, whole = ratio["compiled_step_tokens_per_s"], ratio["decode_graph_generate_tokens_per_s"]
        first, memory = ratio["first_token_2048_ms"], ratio["peak_GiB"]
        yield _line(
            f"H100, 8B model, {scheme}: compiled decode step, times dense", f"{step}", f"{speed:.2f}", speed >= step
        )
        yield _line(f"the same, {scheme}: `DecodeGraph.generate`", "never slower", f"{whole:.2f}", whole >= 1)
        yield _line(f"the same, {scheme}: time of a prompt of 2048", "at most 1.15", f"{first:.2f}", first <= 1.15)
        yield _line(f"the same, {scheme}: peak memory of dense", "under 0.33", f"{memory:.2f}", memory < 1 / 3)


_UNITS = ("_per_s", "_ms", "_GiB")


def _cpu_goals() -> Iterable[list[str]]:
    cases = {key[2:]: case for key, case in cpu_cases("cpu_linear_*_2x8g8.csv").items()}
    for threads, peer, needs in (
        (1, "dense fp32", {1: 3.0, 4: 6.0, 8: 6.0, 64: 0.8}),
        (2, "dense fp32", {1: 5.0, 4: 6.0, 8: 6.0, 64: 0.8}),
        (1, "official fp32", {1: 1.5}),
        (2, "dense bf16", {1: 2.5}),
    ):
        ratios = [over(cases[tokens, threads], peer) for tokens in needs]
        counts = f"{' / '.join(map(str, needs))} token{'s' if len(needs) > 1 else ''}"
        yield [
            f"CPU, 2x8g8, 4096x11008, {threads} thread{'s' if threads > 1 else ''}, {counts}: times {peer}",
            " / ".join(f"{need:g}" for need in needs.values()),
            "",
            " / ".join(bold(ratio, ratio >= need) for ratio, need in zip(ratios, needs.values(), strict=True)),
            "met" if all(ratio >= need for ratio, need in zip(ratios, needs.values(), strict=True)) else "missed",
        ]


def _solver_goals() -> Iterable[list[str]]:
    layers = list({row["layer"]: row for row in read_solver("blocks")}.values())
    blocks = len(layers) / len(LAYERS)
    seconds = sum(float(row["seconds"]) for row in layers) / blocks
    times = official("seconds of code search")["a block"] / seconds
    yield _line(
        "H100, code search of a block: seconds", "a tenth of the official 19.3", f"{seconds:.2f}", times >= 10, "2"
    )
    whole = seconds_of_30_blocks()
    times = official("seconds, SmolLM2")["30"] / whole
    yield _line(
        "all 30 blocks with calibration and fine-tuning: seconds",
        "a tenth of the official 625",
        f"{whole:.0f}",
        times >= 10,
    )
    worst = max(float(row["ratio"]) for row in layers)
    yield _line("activation error of every layer over the official one", "below 1", f"at most {worst:.2f}", worst < 1)
    ratios, found = official_ratios(), calibrated("2x8g8+ft", "nvidia_h100_*_calibration.csv")
    lower = all(ratio < ratios[blocks] for blocks, ratio in found.items())
    what = "perplexity over dense, 1, 3, ... 30 blocks quantized and fine-tuned (shown: 30)"
    yield _line(what, f"below official ({ratios['30']:.2f})", f"{found['30']:.2f}", lower, "1.8")
    tuned = min(
        float(row["ratio"]) for row in read("nvidia_h200_*_calibration.csv") if row["case"].startswith("2x8g8+ft+p")
    )
    yield _line(
        "the same after PV-tuning (H200)", f"below {found['30']:.2f}", f"{tuned:.2f}", tuned < found["30"], "1.5"
    )
    errors = {row["scheme"]: float(row["error"]) for row in read_solver("gaussian")}
    yield _line(
        "Gaussian weights, 2x8g8: mean squared error", "0.098", f"{errors['2x8g8']:.4f}", errors["2x8g8"] <= 0.098
    )
    memory = read("nvidia_h100_*_memory.csv")
    for model, most in (("7B", 24), ("70B", 80)):
        peak = max(float(row["peak_bytes"]) for row in memory if row["block"].endswith(f"-{model}")) / 1e9
        yield _line(f"{model}, 2x8g8: GPU memory of `calibrate`, GB", f"under {most}", f"{peak:.1f}", peak < most)
