"""How many tokens a second does a model generate on the CPU: 2x8g8 against dense float32 and bfloat16, in one run.

SmolLM2-135M-Instruct (GGUF Q4_1, dequantized) with every linear layer of its blocks quantized by k-means alone, without
data: that takes two minutes, ruins the answers and leaves the speed as it is. Layers that share their input run as one
(`fuse_`). The logits are compared with those of the same model with dequantized weights before anything is timed.
Models take turns answering one prompt; the time of the prompt itself is not counted.

    python -P benchmarks/benchmark_cpu_generate.py
"""

import argparse
import copy
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from rich.progress import Progress

from aqlm_tensor import SolverConfig, aqlm_2x8, fuse_, quantize_
from aqlm_tensor.blocks import dense_weights, in_blocks
from aqlm_tensor.cli.output import failures, note, phase
from aqlm_tensor.evaluate import generate
from aqlm_tensor.hf_model import find_model, load_model

sys.path.insert(0, str(Path(__file__).parent))  # `python -P` leaves it out; the repository's root must stay out
from demo import model_folder
from harness import RESULTS, Timing, provenance, write_csv

PROMPT = "Tell me a long story about a fisherman and the sea."


def make_models() -> tuple[dict[str, Any], Any]:
    """The models by name, and their tokenizer; the quantized ones are checked."""
    dense, tokenizer = load_model(find_model(model_folder()))
    quantized = copy.deepcopy(dense)
    with phase("quantizing without data"):
        quantize_(quantized, aqlm_2x8(solver=SolverConfig(max_rounds=0)), filter_fn=in_blocks(quantized))
    fuse_(quantized)
    tokens = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with phase("checking"), torch.no_grad():
        logits = quantized(tokens).logits
        with dense_weights(quantized):
            expected = quantized(tokens).logits
        error = float((logits - expected).norm() / expected.norm())
        assert error < 1e-4, f"logits are wrong: relative error {error}"
    models = {"dense fp32": dense, "dense bf16": copy.deepcopy(dense).to(torch.bfloat16), "ours fp32": quantized}
    return models | {"ours bf16": copy.deepcopy(quantized).to(torch.bfloat16)}, tokenizer


def main() -> None:
    """Run, show and store the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--tokens", type=int, default=48, help="per answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="CSV file")
    options = parser.parse_args()
    origin = provenance(("torch", "numba", "transformers"))
    models, tokenizer = make_models()
    results = []
    with Progress() as progress:
        task = progress.add_task("", total=len(options.threads) * (options.rounds + 1) * len(models))
        for threads in options.threads:
            torch.set_num_threads(threads)
            milliseconds: dict[str, list[float]] = {name: [] for name in models}
            for round_ in range(options.rounds + 1):
                for name, model in models.items():
                    progress.update(task, description=f"{name}, {threads} thread(s)", advance=1)
                    answer = generate(model, tokenizer, PROMPT, max_new_tokens=options.tokens)
                    if round_:  # the first one warms up
                        milliseconds[name].append(1e3 / answer.tokens_per_second)
            medians = {name: Timing.of(times) for name, times in milliseconds.items()}
            for name, timing in medians.items():
                ratios = {f"{peer}_over_this": round(medians[peer].p50 / timing.p50, 3) for peer in list(medians)[:2]}
                results.append(
                    {"threads": threads, "model": name, "tokens_per_second": round(1e3 / timing.p50, 2)}
                    | {"ms_p20": round(timing.p20, 2), "ms_p50": round(timing.p50, 2), "ms_p80": round(timing.p80, 2)}
                    | {key.replace(" ", "_"): value for key, value in ratios.items()}
                )
                note(" ".join(f"{key}={value}" for key, value in results[-1].items()))
    output = options.output or RESULTS / f"cpu_generate_{origin['date'][:10]}.csv"
    write_csv(output, results, origin)
    note(f"written: {output}")


if __name__ == "__main__":
    with failures():
        main()
