"""Perplexity on a held-out text while `aqlm-tensor quantize` works: of the dense model, on the way, at the end."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from aqlm_tensor import evaluate
from aqlm_tensor.blocks import find_blocks
from aqlm_tensor.calibration.report import MeasuredPerplexity
from aqlm_tensor.cli.output import note
from aqlm_tensor.cli.prepare import moved

__all__ = ["Evaluation"]


@dataclass
class Evaluation:
    """Measures a model that is being quantized; the whole of it goes to the device for that.

    Attributes:
        model: on any device.
        tokens: of the text [n]; None measures nothing.
        seqlen: tokens of a window.
        every: so many blocks; 0 only measures at the beginning and the end.
        device: where to compute.
        points: what was measured.
    """

    model: Any
    tokens: Tensor | None
    seqlen: int
    every: int
    device: str
    points: list[MeasuredPerplexity] = field(default_factory=list)

    def after_block(self, done: int) -> None:
        """Measure, if it is time to: so many blocks are quantized."""
        if done == len(find_blocks(self.model)) or (self.every and done % self.every == 0):
            self.measure("calibrated", done)

    def measure(self, stage: Literal["dense", "calibrated", "tuned"], blocks: int) -> None:
        """Measure now. A model that is too large for the device goes without."""
        if self.tokens is None:
            return
        try:
            with moved(self.model, self.device):
                found = evaluate.perplexity(self.model, self.tokens, self.seqlen)
        except torch.OutOfMemoryError:
            note(f"the {stage} model does not fit on {self.device} as a whole: its perplexity is not measured")
            return
        self.points.append(MeasuredPerplexity(stage, blocks, found.perplexity, self.seqlen, found.predicted))
        note(f"perplexity {found.perplexity:.4f} ({stage}, {blocks} blocks quantized), {found.seconds:.1f} s")
