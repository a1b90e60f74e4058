"""The tables of README.md beside this file, written from the CSV files in results/, so that no number is typed.

    python -P benchmarks/tables.py            # after new results; a test holds that nothing is left to be changed

Each table stands between `<!-- NAME -->` and `<!-- end -->`, NAME being a function of TABLES.
"""

import sys
from collections.abc import Callable
from pathlib import Path

from aqlm_tensor.scheme import AQLMScheme

sys.path.insert(0, str(Path(__file__).parent))  # `python -P` leaves it out; the repository's root must stay out
from goals import LINEAR_GOALS, goals
from plots import smollm2_bits
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
    table,
)

__all__ = ["README", "TABLES", "rendered"]

README = Path(__file__).parent / "README.md"
ALL_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)


def gpu_linear() -> str:
    """Every scheme and shape of ours; bold where what is required is reached."""
    needs = {
        (name, shape, m): need
        for name, shapes, tokens, required, _ in LINEAR_GOALS
        for shape in shapes
        for m, need in zip(tokens, required, strict=True)
    }
    found = {key: ratios for key, ratios in linear().items() if key[0][0].isdigit()}
    order = list(dict.fromkeys(name.split(",")[0] for name, _ in found))
    rows = []
    for name, shape in sorted(found, key=lambda key: (order.index(key[0].split(",")[0]), key[0])):
        ratios = found[name, shape]
        cells = [
            bold(ratios[m], ratios[m] >= needs.get((name, shape, m), 1e9)) if m in ratios else "" for m in ALL_TOKENS
        ]
        rows.append([name, shape, *cells])
    return table(["scheme", "in x out", *(f"M={m}" for m in ALL_TOKENS)], rows)


def gpu_peers() -> str:
    """Ours and others for one large layer."""
    names = ("2x8g8", "official 2x8g8", "PyTorch int4", "1x16g8", "official 1x16g8", "1x8g8", "official 1x8g8")
    found = linear()
    rows = []
    for name in names:
        ratios = found[name, LARGE[0]]
        ours = f"ours, {name}" if name[0].isdigit() else name
        rows.append([ours, *(f"{ratios[m]:.2f}" if m in ratios else "" for m in ALL_TOKENS)])
    return table([LARGE[0], *(f"M={m}" for m in ALL_TOKENS)], rows)


def gpu_model() -> str:
    """The whole model; ratios are to the dense model of the same run."""
    rows, dense = [], {}
    for row in read("nvidia_h100_*_model.csv"):
        dense = row if row["candidate"].startswith("dense") else dense
        cells = [row["candidate"]]
        for column, digits, more in (
            ("compiled_step_tokens_per_s", 1, "times"),
            ("decode_graph_generate_tokens_per_s", 1, "times"),
            ("first_token_2048_ms", 1, "times"),
            ("first_token_128_ms", 1, "times"),
            ("peak_GiB", 1, "times"),
        ):
            if not row[column]:
                cells.append("")
            else:
                ratio = "" if row is dense else f" ({float(row[column]) / float(dense[column]):.2f} {more})"
                cells.append(f"{float(row[column]):.{digits}f}{ratio}")
        rows.append(cells)
    head = ["", "compiled step, tokens/s", "`DecodeGraph.generate`, tokens/s", "first token of 2048, ms"]
    return table([*head, "of 128, ms", "peak GiB"], rows)


def cpu_linear() -> str:
    """2x8g8 with every peer."""
    rows = []
    for (_, _, tokens, threads), case in cpu_cases("cpu_linear_*_2x8g8.csv").items():
        mine = case["ours fp32"]
        official = case.get("official fp32")
        wrong = ", wrong" if official is not None and official["verdict"] == "WRONG" else ""
        rows.append(
            [
                *map(str, (tokens, threads)),
                " / ".join(f"{float(case[name]['p50_ms']):.2f}" for name in ("ours fp32", "ours bf16")),
                *(f"{over(case, peer):.2f}" for peer in ("dense fp32", "dense bf16")),
                f"{over(case, 'official fp32'):.2f}{wrong}" if official else "-",
                f"{max(float(mine['limit_memory_ms']), float(mine['limit_work_ms'])):.2f}",
            ]
        )
    return table(
        ["M", "threads", "ours fp32 / bf16, ms", "dense fp32", "dense bf16", "official fp32", "limit, ms"], rows
    )


def _cpu_grid(pattern: str, digits: int) -> str:
    cases = cpu_cases(pattern)
    threads = sorted({key[3] for key in cases})
    tokens = sorted({key[2] for key in cases})
    rows = []
    for shape, scheme in dict.fromkeys(key[:2] for key in cases):
        cells = [
            " / ".join(f"{over(cases[shape, scheme, m, count], 'dense fp32'):.{digits}f}" for count in threads)
            for m in tokens
        ]
        rows.append([shape, scheme, *cells])
    return table(["in x out", "scheme", *(f"M={m}" for m in tokens)], rows)


def cpu_shapes() -> str:
    """Every shape and scheme, dense fp32 over ours."""
    return _cpu_grid("cpu_linear_????-??-??.csv", 1)


def cpu_input_grad() -> str:
    """The same of the gradient to x."""
    return _cpu_grid("cpu_input_grad_*.csv", 1)


def cpu_generate() -> str:
    """Tokens a second of a whole model."""
    found = {(row["threads"], row["model"]): row for row in read("cpu_generate_*.csv")}
    models = list(dict.fromkeys(model for _, model in found))
    rows = []
    for threads in dict.fromkeys(threads for threads, _ in found):
        cells = []
        for model in models:
            row = found[threads, model]
            times = [f"{float(row[f'dense_{dtype}_over_this']):.2f} times {dtype}" for dtype in ("fp32", "bf16")]
            cells.append(
                f"{float(row['tokens_per_second']):.1f}"
                + (f" ({', '.join(times)})" if model.startswith("ours") else "")
            )
        rows.append([threads, *cells])
    return table(["threads", *models], rows)


def calibration() -> str:
    """2x8g8 block by block."""
    blocks = list(official_ratios())
    lines = {
        "fine-tuned blocks": calibrated("2x8g8+ft", "nvidia_h100_*_calibration_2.csv"),
        "without fine-tuning (one H200)": calibrated("2x8g8", "nvidia_h200_*_calibration.csv"),
        "official, fine-tuned, another text of the corpus": official_ratios(),
    }
    rows = [[name, *(f"{found[k]:.3f}" if k in found else "" for k in blocks)] for name, found in lines.items()]
    return table(["blocks quantized", *blocks], rows)


def pipeline() -> str:
    """Every scheme: blocks fine-tuned, then PV-tuned with its codes as they were."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for row in read("nvidia_h200_*_calibration.csv"):
        if row["case"].endswith("+ft+p") or row["case"] == "2x8g8+ft":
            found.setdefault(row["case"].partition("+")[0], {})[f"{row['stage']} {row['blocks']}"] = row
    rows = []
    for scheme in sorted(found, key=smollm2_bits):
        by_stage = found[scheme]
        few = [by_stage[f"calibrated {k}"]["ratio"] for k in (1, 3, 6, 10, 15) if f"calibrated {k}" in by_stage]
        whole, tuned = by_stage["calibrated 30"], by_stage["pv-tuned 30"]
        cells = [
            cell for row in (whole, tuned) for cell in (f"{float(row['ratio']):.3f}", f"{float(row['seconds']):.0f}")
        ]
        first = ", ".join(f"{float(ratio):.3f}" for ratio in few) or "above"
        rows.append([scheme, f"{smollm2_bits(scheme):.3f}", first, *cells, tuned["steps"]])
    head = ["scheme", "bits a weight", "1, 3, 6, 10, 15 blocks", "30 blocks", "s", "PV-tuned", "s", "steps"]
    return table(head, rows)


def tuning() -> str:
    """What steps, text and choosing codes add to 2x8g8, from the same start."""
    rows = [
        ["the text", row["steps"], row["code_fraction"], row["seconds"], row["held_out_divergence"], row["ratio"]]
        for row in sorted(read("nvidia_h200_*_calibration.csv"), key=lambda row: (row["steps"], row["code_fraction"]))
        if row["case"].startswith("2x8g8+ft+p")
    ]
    rows += [
        [
            row["tuned_on"],
            row["steps"],
            row["code_fraction"],
            row["seconds"],
            row["held_out_divergence"],
            row["times_dense"],
        ]
        for row in read("nvidia_h200_*_tuning_data.csv")[1:]
    ]
    formats = ("{}", "{}", "{:g}", "{:.0f}", "{:.3f}", "{:.4f}")
    cells = [
        [
            form.format(float(cell) if "f" in form or "g" in form else cell)
            for form, cell in zip(formats, row, strict=True)
        ]
        for row in rows
    ]
    return table(
        ["tuned on", "steps", "codes chosen, at most", "s", "held-out divergence, nats a token", "times dense"], cells
    )


def solver() -> str:
    """Activation errors of single layers over the official solver's."""
    found = {row["layer"]: row for row in read("nvidia_h100_*_solver.csv") if row["part"] == "blocks"}
    search = official("seconds of code search")["a block"]
    rows = []
    for block in dict.fromkeys(layer.split(".")[0] for layer in found):
        layers = [found[f"{block}.{kind}"] for kind in LAYERS]
        seconds = sum(float(row["seconds"]) for row in layers)
        rows.append([block, *(f"{float(row['ratio']):.3f}" for row in layers), f"{seconds:.2f}", f"{search:g}"])
    return table(["block", *LAYERS, "s a block", "official, s"], rows)


def gaussian() -> str:
    """Mean squared error on Gaussian weights; the later file counts where both have a scheme."""
    seconds = official("seconds, Gaussian")
    rows = [row for pattern in ("_solver", "_solver_2") for row in read(f"nvidia_h100_*{pattern}.csv")]
    found = {row["scheme"]: row for row in rows if row["part"] == "gaussian"}
    lines = [
        ["ours", *(f"{float(row['error']):.4f}" for row in found.values())],
        ["official", *(f"{float(row['official']):.4f}" for row in found.values())],
        ["the limit D(R) at this rate", *(f"{2.0 ** (-2 * _rate(scheme)):.4f}" for scheme in found)],
        ["ours, s", *(f"{float(row['seconds']):.2f}" for row in found.values())],
        ["official, s, H100", *(f"{seconds[scheme]:g}" for scheme in found)],
    ]
    return table(["", *found], lines)


def _rate(scheme: str) -> float:
    parsed = AQLMScheme.parse(scheme)
    return parsed.num_codebooks * parsed.nbits_per_codebook / parsed.in_group_size


def scaling() -> str:
    """Seconds and peak memory of layers of large models."""
    rows = [row for pattern in ("_solver", "_solver_2") for row in read(f"nvidia_h100_*{pattern}.csv")]
    found = {(row["layer"], row["scheme"]): row for row in rows if row["part"] == "scaling"}
    lines = [
        [*key, f"{float(row['seconds']):.1f}", f"{float(row['peak_gb']):.1f}"] for key, row in sorted(found.items())
    ]
    return table(["in x out", "scheme", "s", "peak GB"], lines)


def calibration_data() -> str:
    """What calibrating on which data is worth."""
    rows = [
        [row["data"], f"{float(row['ratio']):.3f}", f"{float(row['output_error']):.3f}"]
        for row in read("calibration_data_*.csv")
        if row["data"] != "dense"
    ]
    return table(["calibrated on", "times dense", "error of the third block's output"], rows)


def conversations() -> str:
    """The same for a chat model."""
    rows = [
        [
            row["calibrated_on"],
            row["kl_conversations"],
            row["kl_wikitext2"],
            f"{float(row['perplexity_wikitext2']):.1f}",
        ]
        for row in read("conversations_*.csv")
    ]
    return table(["calibrated on", "on conversations", "on WikiText-2", "perplexity there"], rows)


def quality() -> str:
    """Perplexity over dense against stored bits, ours without tuning and other formats."""
    names = {"aqlm": "ours", "mixed": "ours, mixed, of the size of", "rtn": "round to nearest", "hqq": "HQQ"}
    rows = [
        [
            f"{names[row['method']]} {row['setting']}",
            f"{float(row['bits_per_weight']):.2f}",
            _times(float(row["ratio"])),
        ]
        for row in read("quality_*_h100.csv")
        if row["method"] in names
    ]
    rows += [
        [
            f"GPTQ {row['setting']}, the first 6 windows",
            f"{float(row['bits_per_weight']):.2f}",
            _times(float(row["ratio"])),
        ]
        for row in sorted(read("quality_*_gptq.csv"), key=lambda row: row["setting"])
        if row["method"] == "gptq"
    ]
    return table(["", "bits a weight", "times dense"], rows)


def _times(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 100 else f"{ratio:.0f}"


def lora() -> str:
    """LoRA and DoRA on codes and on dense weights: the long run on one thread, the short one on two."""
    rows = []
    for pattern, threads in (("lora_????-??-??.csv", "1"), ("lora_*_two_threads.csv", "2")):
        for row in read(pattern):
            learned = [row["perplexity_before"], row["perplexity_after"]]
            rows.append(
                [
                    threads,
                    f"{'LoRA' if row['adapter'] == 'lora' else 'DoRA'}, {row['weights']}",
                    ""
                    if learned[0] == "nan"
                    else f"{', '.join(f'{float(x):.2f}' for x in learned)} ({row['steps']} steps)",
                    f"{row['step_ms_p50']} ({float(row['time_ratio']):.2f} of dense)",
                    f"{float(row['peak_gb']):.2f}",
                ]
            )
    return table(["threads", "", "perplexity, before and after", "ms a step, median", "peak GB"], rows)


TABLES: dict[str, Callable[[], str]] = {
    write.__name__: write
    for write in (
        goals,
        gpu_linear,
        gpu_peers,
        gpu_model,
        cpu_linear,
        cpu_shapes,
        cpu_input_grad,
        cpu_generate,
        calibration,
        pipeline,
        tuning,
        solver,
        gaussian,
        scaling,
        quality,
        calibration_data,
        conversations,
        lora,
    )
}


def rendered(text: str) -> str:
    """A text with every table written anew."""
    for name, write in TABLES.items():
        start, end = f"<!-- {name} -->\n", "<!-- end -->"
        before, found, rest = text.partition(start)
        if not found:
            raise ValueError(f"README.md has no place for the table {name}: {start.strip()}")
        text = f"{before}{start}{write()}\n{end}{rest.partition(end)[2]}"
    return text


if __name__ == "__main__":
    README.write_text(rendered(README.read_text(encoding="utf-8")), encoding="utf-8")
