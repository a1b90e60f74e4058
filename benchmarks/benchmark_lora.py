"""What does LoRA on a 2-bit model learn, and what does a step cost, against LoRA on the dense model?

SmolLM2-135M-Instruct (GGUF Q4_1 dequantized to float32) and its calibrated 2x8g8 version get the same adapters on all
linear layers and the same batches, one step each in turn. DoRA takes part for a few steps, to be timed. Held-out
perplexity is measured before and after; peak memory in a process per candidate, during two steps, without loading.
"""

import argparse
import datetime as dt
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

import aqlm_tensor.integrations.peft_lora  # noqa: F401 - teaches PEFT
from aqlm_tensor import SolverConfig, aqlm_2x8
from aqlm_tensor.blocks import sample_windows
from aqlm_tensor.cli.output import failures, note, phase
from aqlm_tensor.cli.progress import batched, quantize_with_bar
from aqlm_tensor.evaluate import perplexity
from aqlm_tensor.hf_model import find_model, load_model, save_model

sys.path.insert(0, str(Path(__file__).parent))  # `python -P` leaves it out; the repository's root must stay out
from demo import model_folder
from harness import RESULTS, Timing, provenance, split_text, write_csv

CANDIDATES = (("lora", "dense"), ("lora", "2x8g8"), ("dora", "dense"), ("dora", "2x8g8"))
TIMED_STEPS = 8  # of the candidates that are timed only


@dataclass
class Candidate:
    """A model with an adapter, its optimizer, and what was measured."""

    model: Any
    optimizer: torch.optim.Optimizer
    milliseconds: list[float] = field(default_factory=list)
    before: float = float("nan")
    after: float = float("nan")

    @classmethod
    def load(cls, adapter: str, folder: Path, rank: int) -> "Candidate":
        """The model in a folder, with an adapter on all linear layers of its blocks, in training mode."""
        model, _ = load_model(find_model(folder))
        torch.manual_seed(0)
        config = LoraConfig(target_modules="all-linear", r=rank, lora_alpha=2 * rank, use_dora=adapter == "dora")
        adapted = get_peft_model(model, config)
        trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        return cls(adapted, torch.optim.AdamW(trained, lr=2e-4))

    def step(self, batch: Tensor) -> None:
        """One step of the optimizer on token ids [B, seqlen], timed."""
        self.model.train()
        start = time.perf_counter()
        self.model(batch, labels=batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.milliseconds.append(1e3 * (time.perf_counter() - start))


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="train on it but for its last fifth, which is held out")
    parser.add_argument("--quantized", type=Path, help="a saved 2x8g8 version; by default it is made as in demo.py")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--held-out-tokens", type=int, default=8192, help="at most so many for the perplexity")
    parser.add_argument("--output", type=Path, default=RESULTS / f"lora_{dt.datetime.now(dt.UTC).date()}.csv")
    parser.add_argument("--memory-of", choices=["lora", "dora"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with failures():
        if arguments.memory_of:
            print(json.dumps(peak_memory(arguments)))
        else:
            run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Train and time the candidates in turn, and write a row for each."""
    with tempfile.TemporaryDirectory() as temporary:
        dense = model_folder()
        training, held_out = split_text(load_model(find_model(dense))[1], arguments.text)
        held_out = held_out[: arguments.held_out_tokens]
        quantized = arguments.quantized or _quantize(dense, training, Path(temporary) / "2x8g8")
        folders = {"dense": dense, "2x8g8": quantized}
        memory = {key: _memory_in_own_process(key[0], folders[key[1]], arguments) for key in CANDIDATES}
        candidates = {key: Candidate.load(key[0], folders[key[1]], arguments.rank) for key in CANDIDATES}
        _train_in_turn(candidates, training, held_out, arguments)
    rows = [_row(key, candidates, memory, len(held_out), arguments) for key in CANDIDATES]
    for row in rows:
        note(str(row))
    write_csv(arguments.output, rows, provenance(("torch", "transformers", "peft", "numba", "aqlm-tensor")))


def _quantize(dense: Path, training: Tensor, folder: Path) -> Path:
    """Calibrate and quantize all blocks, as the demo does."""
    model, tokenizer = load_model(find_model(dense))
    batches = batched(sample_windows(training, 12, 1024))
    quantize_with_bar(model, aqlm_2x8(solver=SolverConfig(max_rounds=2)), batches)
    save_model(model, tokenizer, folder)
    return folder


def _train_in_turn(
    candidates: dict[tuple[str, str], Candidate], training: Tensor, held_out: Tensor, arguments: argparse.Namespace
) -> None:
    lora = {key: candidate for key, candidate in candidates.items() if key[0] == "lora"}
    for key, candidate in lora.items():
        with phase(f"perplexity of {key[1]}"):
            candidate.before = perplexity(candidate.model, held_out, 1024).perplexity
    size = arguments.batch * arguments.seqlen
    for index in range(arguments.steps):
        start = index * size % (len(training) - size)
        batch = training[start : start + size].view(arguments.batch, arguments.seqlen)
        for candidate in (candidates if index < TIMED_STEPS else lora).values():
            candidate.step(batch)
    for key, candidate in lora.items():
        with phase(f"perplexity of {key[1]} after {arguments.steps} steps"):
            candidate.after = perplexity(candidate.model, held_out, 1024).perplexity


def _row(
    key: tuple[str, str],
    candidates: dict[tuple[str, str], Candidate],
    memory: dict[tuple[str, str], dict[str, float]],
    held_out: int,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """A line of the CSV; the first step, which compiles, is not timed; ratios are to the dense model, same adapter."""
    candidate, dense = candidates[key], candidates[key[0], "dense"]
    rounds = len(candidate.milliseconds)
    timing, reference = (Timing.of(c.milliseconds[1:rounds]) for c in (candidate, dense))
    return {
        "adapter": key[0],
        "weights": key[1],
        "steps": arguments.steps if key[0] == "lora" else 0,
        "batch": arguments.batch,
        "seqlen": arguments.seqlen,
        "rank": arguments.rank,
        "perplexity_before": round(candidate.before, 3),
        "perplexity_after": round(candidate.after, 3),
        "held_out_tokens": held_out,
        "step_ms_p20": round(timing.p20),
        "step_ms_p50": round(timing.p50),
        "step_ms_p80": round(timing.p80),
        "timed_steps": timing.rounds,
        "time_ratio": round(timing.p50 / reference.p50, 3),
        "loaded_gb": round(memory[key]["loaded"], 3),
        "peak_gb": round(memory[key]["peak"], 3),
        "peak_ratio": round(memory[key]["peak"] / memory[key[0], "dense"]["peak"], 3),
    }


def _memory_in_own_process(adapter: str, folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, "-P", __file__, "--memory-of", adapter, "--quantized", str(folder)]
    command += [f"--{name}={getattr(arguments, name)}" for name in ("batch", "seqlen", "rank")]
    with phase(f"memory of {adapter}, {folder.name}"):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def peak_memory(arguments: argparse.Namespace) -> dict[str, float]:
    """GB of this process with the model loaded, and at most during two steps; the interpreter and its libraries too."""
    candidate = Candidate.load(arguments.memory_of, arguments.quantized, arguments.rank)
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")  # Linux: forget the peak of loading
    loaded = _resident("VmRSS")
    batch = torch.arange(arguments.batch * arguments.seqlen).view(arguments.batch, arguments.seqlen)
    for _ in range(2):
        candidate.step(batch)
    return {"loaded": loaded, "peak": _resident("VmHWM")}


def _resident(name: str) -> float:
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(fields[name].split()[0]) * 1024 / 1e9


if __name__ == "__main__":
    main()
