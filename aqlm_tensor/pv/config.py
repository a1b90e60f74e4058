"""PVConfig: the effort and the step sizes of `tune_pv`."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from aqlm_tensor.training import Precision, held_out

__all__ = ["PVConfig"]

Dense = Literal["none", "vectors", "all"]


@dataclass(frozen=True, kw_only=True)
class PVConfig:
    """How `tune_pv` tunes a model; every field is JSON-able.

    Sizes of steps are relative to the root mean square of the tensor that they change, so that they mean the same for
    every layer and checkpoint.

    Attributes:
        epochs: passes over the training batches, at most.
        lr: Adam's step for codebooks, scales and trained dense parameters at the start; it falls to a tenth along a
            half cosine.
        batches_per_step: batches whose gradients are averaged for one step.
        steps_per_round: continuous steps between two choices of codes. Each round ends with a validation.
        code_fraction: share of all groups whose codes may change at the end of a round; 0 leaves all codes as they
            are, which is as good and faster with little text.
        trust_ratio: the codes chosen at the end of a round may change a layer by at most this part of its norm.
        dense: which dense parameters are trained along: "none", "vectors" (norms and biases, whatever has one
            dimension) or "all".
        validation: share of the batches, the last ones, held out to choose the best state (at least one batch).
        patience: stop after so many rounds in a row without a better validation loss.
        precision: what products are computed in. "auto" is bfloat16 on GPUs that have it, float32 elsewhere; trained
            parameters and sums are float32 always.
        gradient_checkpointing: compute the inside of each block again in the backward pass rather than keep it;
            sharded models need it.
        gradient_memory: bytes that gradients of dense weights and X^T X of their inputs may take, 4 for each entry (and
            about five times as much while codes are chosen); each round then chooses codes for as many layers as fit,
            in turn. None chooses for all in each round, which sharded models cannot.
        cuda_graph: replay passes as a CUDA graph where model and teacher are on one NVIDIA GPU, no operation waits for
            it and one process tunes; several times as fast for small models.
        save_every: rounds between two savings of the state to the work folder.
        seed: of the order of the batches.

    Raises:
        ValueError: for a value that makes no sense, naming the accepted ones.
        TypeError: for a field of the wrong type.
    """

    epochs: int = 8
    lr: float = 2.5e-3
    batches_per_step: int = 1
    steps_per_round: int = 50
    code_fraction: float = 0.05
    trust_ratio: float = 0.3
    dense: Dense = "vectors"
    validation: float = 0.0625
    patience: int = 8
    precision: Precision = "auto"
    gradient_checkpointing: bool = False
    gradient_memory: int | None = None
    cuda_graph: bool = True
    save_every: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batches_per_step", "steps_per_round", "patience", "save_every", "seed"):
            _check_number(name, getattr(self, name), int)
            if name != "seed" and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "code_fraction", "trust_ratio", "validation"):
            _check_number(name, getattr(self, name), float)
        for name in ("lr", "trust_ratio"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if not 0 <= self.code_fraction <= 1:
            raise ValueError(f"code_fraction must lie in [0, 1], got {self.code_fraction}")
        if not 0 < self.validation < 1:
            raise ValueError(f"validation must lie between 0 and 1, got {self.validation}")
        for name, accepted in (("dense", get_args(Dense)), ("precision", get_args(Precision))):
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} must be one of {', '.join(accepted)}, got {getattr(self, name)!r}")
        for name in ("gradient_checkpointing", "cuda_graph"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.gradient_memory is not None:
            _check_number("gradient_memory", self.gradient_memory, int)
            if self.gradient_memory < 1:
                raise ValueError(f"gradient_memory must be None or positive, got {self.gradient_memory}")

    def held_out(self, batches: int) -> range:
        """Which of so many batches are held out: the last ones.

        Raises:
            ValueError: for fewer than two batches.
        """
        return held_out(batches, self.validation, "tuning")

    def steps(self, batches: int) -> int:
        """Steps in all for so many batches, those held out among them."""
        return max(1, self.epochs * self.held_out(batches).start // self.batches_per_step)


def _check_number(name: str, value: object, kind: type[int] | type[float]) -> None:
    accepted = int if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, accepted):
        raise TypeError(f"{name} must be {'an int' if kind is int else 'a number'}, got {value!r}")
