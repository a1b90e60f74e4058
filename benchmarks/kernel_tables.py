"""Tables of README.md about kernels and whole models: times of peers over ours."""

from goals import LINEAR_GOALS
from readings import LARGE, bold, cpu_cases, linear, over, read, table

__all__ = ["cpu_generate", "cpu_input_grad", "cpu_linear", "cpu_shapes", "gpu_linear", "gpu_model", "gpu_peers"]

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)


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
        cells = [bold(ratios[m], ratios[m] >= needs.get((name, shape, m), 1e9)) if m in ratios else "" for m in TOKENS]
        rows.append([name, shape, *cells])
    return table(["scheme", "in x out", *(f"M={m}" for m in TOKENS)], rows)


def gpu_peers() -> str:
    """Ours and others for one large layer."""
    names = ("2x8g8", "official 2x8g8", "PyTorch int4", "1x16g8", "official 1x16g8", "1x8g8", "official 1x8g8")
    found = linear()
    rows = []
    for name in names:
        ratios = found[name, LARGE[0]]
        ours = f"ours, {name}" if name[0].isdigit() else name
        rows.append([ours, *(f"{ratios[m]:.2f}" if m in ratios else "" for m in TOKENS)])
    return table([LARGE[0], *(f"M={m}" for m in TOKENS)], rows)


def gpu_model() -> str:
    """The whole model; ratios are to the dense model of the same run."""
    rows, dense = [], {}
    for row in read("nvidia_h100_*_model.csv"):
        dense = row if row["candidate"].startswith("dense") else dense
        cells = [row["candidate"]]
        for column in (
            "compiled_step_tokens_per_s",
            "decode_graph_generate_tokens_per_s",
            "first_token_2048_ms",
            "first_token_128_ms",
            "first_token_128_fastest_ms",
            "peak_GiB",
        ):
            if row.get(column):
                ratio = "" if row is dense else f" ({float(row[column]) / float(dense[column]):.2f} times)"
                cells.append(f"{float(row[column]):.1f}{ratio}")
            else:
                cells.append("")
        rows.append(cells)
    head = ["", "compiled step, tokens/s", "`DecodeGraph.generate`, tokens/s", "first token of 2048, ms"]
    return table([*head, "of 128, ms", "at best", "peak GiB"], rows)


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
