"""Tables of README.md about quantized models: perplexity, errors, seconds and memory."""

from plots import smollm2_bits
from readings import LAYERS, calibrated, official, official_ratios, read, read_solver, table

from aqlm_tensor.scheme import AQLMScheme

__all__ = [
    "calibration",
    "calibration_data",
    "conversations",
    "gaussian",
    "lora",
    "pipeline",
    "pipeline_rows",
    "quality",
    "scaling",
    "solver",
    "tuning",
]


def calibration() -> str:
    """2x8g8 block by block, and the seconds of all blocks."""
    blocks = list(official_ratios())
    lines = {
        "fine-tuned blocks": ("2x8g8+ft", "nvidia_h100_*_calibration.csv"),
        "without fine-tuning (one H200)": ("2x8g8", "nvidia_h200_*_calibration.csv"),
    }
    rows = []
    for name, which in lines.items():
        found = calibrated(*which)
        cells = [f"{found[k]:.3f}" if k in found else "" for k in blocks]
        rows.append([name, *cells, f"{calibrated(*which, 'seconds')['30']:.0f}"])
    theirs = [f"{ratio:.3f}" for ratio in official_ratios().values()]
    seconds = official("seconds, SmolLM2")["30"]
    rows.append(["official, fine-tuned, another text of the corpus", *theirs, f"{seconds:.0f}"])
    return table(["blocks quantized", *blocks, "s, all 30"], rows)


def pipeline() -> str:
    """Every scheme: blocks fine-tuned, then PV-tuned with its codes as they were."""
    head = ["scheme", "bits a weight", "1, 3, 6, 10, 15 blocks", "30 blocks", "s", "PV-tuned", "s", "steps"]
    return table(head, pipeline_rows())


def pipeline_rows() -> list[list[str]]:
    """The cells of that table."""
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
    return rows


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
    found = {row["layer"]: row for row in read_solver("blocks")}
    search = official("seconds of code search")["a block"]
    rows = []
    for block in dict.fromkeys(layer.split(".")[0] for layer in found):
        layers = [found[f"{block}.{kind}"] for kind in LAYERS]
        seconds = sum(float(row["seconds"]) for row in layers)
        rows.append([block, *(f"{float(row['ratio']):.3f}" for row in layers), f"{seconds:.2f}", f"{search:g}"])
    return table(["block", *LAYERS, "s a block", "official, s"], rows)


def gaussian() -> str:
    """Mean squared error on Gaussian weights; the latest of each scheme counts."""
    seconds = official("seconds, Gaussian")
    found = {row["scheme"]: row for row in read_solver("gaussian")}
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
    rows = read_solver("scaling")
    found = {(int(row["in_features"]), int(row["out_features"]), row["scheme"]): row for row in rows}
    lines = [
        [
            row["layer"],
            row["scheme"],
            f"{float(row['seconds']):.1f}",
            f"{float(row['peak_gb']):.1f}",
            row["device"].split()[1],
        ]
        for _, row in sorted(found.items())
    ]
    return table(["in x out", "scheme", "s", "peak GB", ""], lines)


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
