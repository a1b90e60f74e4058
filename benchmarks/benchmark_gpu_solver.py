"""How fast is the layer solver on a GPU, how good, and what does a large model take?

Three parts, one CSV row per layer, written anew after each row:

- `blocks`: all layers of three blocks of SmolLM2-135M-Instruct on X^T X of the dense model, against the activation
  errors that the solver of the official code (AQLM's repository, H100, k-means, Adam and beam search) reached on the
  same inputs in a run of its own;
- `gaussian`: normal weights 4096x4096 without data;
- `scaling`: shapes of 8B and 70B models with the X^T X of correlated inputs, seconds and peak memory.

The first layer of each scheme and part is solved once before it is timed, so that compilation stays out.
"""

import argparse
import datetime as dt
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aqlm_tensor.quantizer.layer import quantize_layer
from aqlm_tensor.quantizer.solver import SolverConfig
from aqlm_tensor.scheme import AQLMScheme

sys.path.insert(0, str(Path(__file__).parent))  # `python -P` leaves it out; the repository's root must stay out
from demo import model_folder
from harness import RESULTS, provenance, write_csv

KINDS = {"q": "q", "k": "q", "v": "q", "o": "o", "gate": "gate", "up": "gate", "down": "down"}  # and whose inputs
OFFICIAL = {  # relative activation errors, 2x8g8, 128 x 1024 tokens of WikiText-2's validation text
    0: (0.00121, 0.00142, 0.01453, 0.00043, 0.02819, 0.06224, 0.01377),
    5: (0.01456, 0.00988, 0.04783, 0.03604, 0.02799, 0.05682, 0.05365),
    16: (0.00662, 0.00560, 0.03490, 0.03267, 0.02532, 0.04499, 0.05288),
}
GAUSSIAN = {"1x8g8": 0.3203, "2x8g8": 0.1031, "3x8g8": 0.0344, "4x8g8": 0.0120, "1x12g8": 0.1642, "1x16g8": 0.0743}
SHAPES = ((4096, 4096), (4096, 14336), (8192, 28672), (14336, 4096))  # inputs, outputs


@dataclass(frozen=True)
class Row:
    """One layer; `error` is relative to the weight's own, `official` what the official solver has there."""

    part: str
    layer: str
    in_features: int
    out_features: int
    scheme: str
    rounds: int
    error: float
    official: float | None
    ratio: float | None
    seconds: float
    peak_gb: float


@dataclass
class Bench:
    """Where rows go."""

    output: Path
    solver: SolverConfig
    rows: list[dict[str, Any]] = field(default_factory=list)
    warm: set[tuple[str, str]] = field(default_factory=set)

    def measure(
        self, part: str, layer: str, weight: Tensor, scheme: str, hessian: Tensor | None, official: float | None
    ) -> float:
        """Solve a layer, print and write a row; the seconds it took."""
        parsed = AQLMScheme.parse(scheme)
        if (scheme, part) not in self.warm:
            self.warm.add((scheme, part))
            quantize_layer(weight, parsed, hessian=hessian, solver=SolverConfig(max_rounds=3, kmeans_iterations=1))
        on_gpu = weight.is_cuda
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        result = quantize_layer(weight, parsed, hessian=hessian, solver=self.solver)
        seconds = time.perf_counter() - start  # the result's error was read: nothing is under way
        peak = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0
        ratio = None if official is None else round(result.error / official, 4)
        outputs, inputs = weight.shape
        error = float(f"{result.error:.5g}")
        row = Row(
            part,
            layer,
            inputs,
            outputs,
            scheme,
            len(result.errors) - 1,
            error,
            official,
            ratio,
            round(seconds, 3),
            round(peak, 2),
        )
        print(row, flush=True)
        self.rows.append(asdict(row))
        write_csv(self.output, self.rows, provenance(("torch",)))
        return seconds


def blocks(bench: Bench, layers: dict[str, Tensor], device: torch.device) -> None:
    """Three blocks of the model, whole."""
    for block, official in OFFICIAL.items():
        seconds = 0.0
        for kind, error in zip(KINDS, official, strict=True):
            weight = layers[f"W.{block}.{kind}"].to(device).float()
            hessian = _symmetric(layers[f"H.{block}.{KINDS[kind]}"].to(device))
            seconds += bench.measure("blocks", f"{block}.{kind}", weight, "2x8g8", hessian, error)
        print(f"block {block}: {seconds:.2f} s", flush=True)


def gaussian(bench: Bench, device: torch.device) -> None:
    """Normal weights, mean squared error."""
    weight = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0)).to(device)
    for scheme, official in GAUSSIAN.items():
        bench.measure("gaussian", "normal", weight, scheme, None, official)


def scaling(bench: Bench, device: torch.device) -> None:
    """Shapes of large models."""
    for inputs, outputs in SHAPES:
        for scheme in ("2x8g8", "1x16g8"):
            generator = torch.Generator(device).manual_seed(0)
            weight = torch.randn(outputs, inputs, device=device, generator=generator)
            mix = torch.randn(inputs, 256, device=device, generator=generator)
            hessian = (mix @ mix.T).div_(256)
            hessian.diagonal().add_(1.0)
            bench.measure("scaling", f"{inputs}x{outputs}", weight, scheme, hessian, None)
            del weight, mix, hessian


def collect(text: Path) -> dict[str, Tensor]:
    """Weights ("W.block.kind") of the blocks, and the upper triangles ("H.block.kind") of their inputs' X^T X."""
    from aqlm_tensor.hf_model import find_model, load_model, tokenize
    from aqlm_tensor.quantizer.hessian import HessianAccumulator

    model, tokenizer = load_model(find_model(model_folder()))
    layers, accumulators = {}, {}
    for block in OFFICIAL:
        for name, linear in model.model.layers[block].named_modules():
            kind = name.rsplit(".", 1)[-1].removesuffix("_proj")
            if kind not in KINDS:
                continue
            layers[f"W.{block}.{kind}"] = linear.weight.detach()
            if KINDS[kind] == kind:
                accumulators[f"H.{block}.{kind}"] = accumulator = HessianAccumulator(linear.in_features)
                linear.register_forward_pre_hook(lambda _layer, args, accumulator=accumulator: accumulator.add(args[0]))
    tokens = tokenize(tokenizer, text.read_text())[: 128 * 1024]
    with torch.inference_mode():
        for batch in tokens.view(-1, 4, 1024):
            model(batch, use_cache=False)
    for name, accumulator in accumulators.items():
        value = accumulator.value()
        layers[name] = value[tuple(torch.triu_indices(*value.shape))]
    return layers


def _symmetric(upper: Tensor) -> Tensor:
    size = int((2 * len(upper)) ** 0.5)
    full = upper.new_zeros(size, size)
    full[tuple(torch.triu_indices(size, size, device=upper.device))] = upper
    return full + full.triu(1).T


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["blocks", "gaussian", "scaling"])
    parser.add_argument("--text", type=Path, help="WikiText-2's validation text, for `blocks`")
    parser.add_argument("--layers", type=Path, help="keep what `blocks` needs in this file, or take it from there")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--max-rounds", type=int, default=SolverConfig().max_rounds)
    parser.add_argument("--output", type=Path, default=RESULTS / f"gpu_solver_{dt.datetime.now(dt.UTC).date()}.csv")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    bench = Bench(arguments.output, SolverConfig(max_rounds=arguments.max_rounds))
    if "blocks" in arguments.parts:
        path = arguments.layers
        if path is not None and path.exists():
            layers = torch.load(path)
        elif arguments.text is not None:
            layers = collect(arguments.text)
            if path is not None:
                torch.save(layers, path)
        else:
            print("blocks: left out, pass --text or --layers")
            layers = None
        if layers is not None:
            blocks(bench, layers, device)
    if "gaussian" in arguments.parts:
        gaussian(bench, device)
    if "scaling" in arguments.parts:
        scaling(bench, device)


if __name__ == "__main__":
    main()
