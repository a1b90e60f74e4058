"""Fine-tune a quantized block against the output it had before: what is continuous in it, the codes stay.

Codebooks, scales, norms and biases are trained with Adam to lower the error of the block's output, as in AQLM
(arXiv 2401.06118, section 3.4). Unlike there, each token's error counts relative to the size of its target: a few
tokens with outputs hundreds of times larger would otherwise decide everything, and the next block normalises them
away. The best state on batches held out is kept, the untrained one included, so that tuning never makes a block worse
on them.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aqlm_tensor.training import held_out, trainable_in_float32

__all__ = ["FinetuneConfig", "finetune_block"]


@dataclass(frozen=True)
class FinetuneConfig:
    """How `calibrate` fine-tunes each block.

    Attributes:
        epochs: passes over the batches, at most.
        lr: Adam's learning rate at the start; it falls to a tenth along a half cosine.
        validation: share of the batches that is held out to choose the best epoch (at least one batch).
        patience: stop after so many epochs in a row without a better validation loss.

    Raises:
        ValueError: for a value that makes no sense, naming the accepted ones.
    """

    epochs: int = 4
    lr: float = 1e-3
    validation: float = 0.125
    patience: int = 2

    def __post_init__(self) -> None:
        for name in ("epochs", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if not 0 < self.validation < 1:
            raise ValueError(f"validation must lie between 0 and 1, got {self.validation}")

    def held_out(self, batches: int) -> range:
        """Which of so many batches are held out: the last ones.

        Raises:
            ValueError: for fewer than two batches.
        """
        return held_out(batches, self.validation, "fine-tuning")


def finetune_block(
    block: nn.Module,
    call: Callable[[int, Tensor], Tensor],
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    config: FinetuneConfig,
    *,
    seed: int = 0,
) -> tuple[float, float]:
    """Train a block's codebooks, scales, norms and biases in place.

    Args:
        block: with AQLM weights; it is trained in float32 and has its own dtype again afterwards.
        call: computes the block's output for a batch's index and its input, in the input's dtype.
        inputs: hidden states [B, seqlen, width], at least two.
        targets: the output that the block should have for each input.
        config: the effort.
        seed: of the order of the batches.

    Returns:
        The mean relative squared error on the batches held out, before and after.

    Raises:
        ValueError: for fewer than two batches.
    """
    held_out = config.held_out(len(inputs))
    with torch.enable_grad(), _trained_in_float32(block) as parameters:

        def loss(index: int) -> Tensor:
            return _relative_error(call(index, inputs[index].float()), targets[index].float())

        def validate() -> float:
            with torch.no_grad():
                return float(sum(loss(index).double() for index in held_out)) / len(held_out)

        optimizer = torch.optim.Adam(parameters, config.lr, betas=(0.9, 0.95))
        steps = config.epochs * held_out.start
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, config.lr / 10)
        generator = torch.Generator().manual_seed(seed)
        first = best = validate()
        kept, stale = _copy(parameters), 0
        for _ in range(config.epochs):
            for index in torch.randperm(held_out.start, generator=generator).tolist():
                optimizer.zero_grad()
                loss(index).backward()
                optimizer.step()
                schedule.step()
            now = validate()
            if now < best:
                best, kept, stale = now, _copy(parameters), 0
            else:  # NaN, too, is not better
                stale += 1
            if stale == config.patience:
                break
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)
    return first, best


def _copy(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def _relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of |output - target|^2 / |target|^2, for tensors [..., width]."""
    power = target.square().sum(-1)
    return ((output - target).square().sum(-1) / power.clamp_min(torch.finfo(power.dtype).tiny)).mean()


@contextlib.contextmanager
def _trained_in_float32(block: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Inside the block of code, everything is float32, and the parameters that are yielded require gradients."""
    with trainable_in_float32(block):
        trained = [
            parameter
            for name, parameter in block.named_parameters()
            if parameter.dim() == 1 or name.rpartition(".")[2] in ("codebooks", "scales")
        ]
        for parameter in trained:
            parameter.requires_grad_(True)
        yield trained
