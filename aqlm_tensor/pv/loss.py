"""What `tune_pv` lowers: the divergence from a teacher's next-token distributions, or the loss on the text itself.

Logits are widened to float32 some positions at a time, since a whole batch of them would be the largest tensor of all.
The divergence from a teacher leaves nothing for the backward pass but its gradient; other losses are computed again
there. Teachers that do not fit beside the model can be run before it is quantized, and
their most likely tokens kept (`teacher_logits`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["Teacher", "TopLogits", "call_model", "check_teacher", "teacher_logits", "token_loss"]

_CHUNK = 1024  # positions whose logits are widened at a time


class TopLogits(NamedTuple):
    """The likeliest tokens of each position; what is left of the probability counts as one more token.

    Attributes:
        log_probs: natural logarithms of their probabilities, [B, seqlen, k], floating point.
        indices: the tokens, [B, seqlen, k], integers.
    """

    log_probs: Tensor
    indices: Tensor


Teacher = nn.Module | Sequence[Tensor | TopLogits]


def call_model(model: nn.Module, batch: Tensor) -> Tensor:
    """Logits [B, seqlen, vocabulary] of a model that returns them, or an object that has them as `logits`."""
    options = {"use_cache": False} if hasattr(model, "generation_config") else {}
    device = next(model.parameters()).device
    output = model(batch.to(device=device, dtype=torch.int64), **options)
    logits: Any = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.shape[:-1] != batch.shape:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"{type(model).__name__} must map token ids {tuple(batch.shape)} to logits [*, vocabulary], got {found}"
        )
    return logits


@torch.no_grad()
def teacher_logits(
    teacher: nn.Module, batches: Sequence[Tensor], *, top_k: int | None = None
) -> list[Tensor | TopLogits]:
    """What a teacher says about each batch, on the CPU, so that `tune_pv` need not run it.

    Args:
        teacher: called as teacher(batch).
        batches: those that will be given to `tune_pv`, in the same order.
        top_k: keep the likeliest so many tokens of each position (6 bytes each); None keeps all logits in the
            teacher's dtype.

    Raises:
        ValueError: for top_k below 1.
    """
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be None or at least 1, got {top_k}")
    kept: list[Tensor | TopLogits] = []
    training = teacher.training
    teacher.eval()
    try:
        for batch in batches:
            logits = call_model(teacher, batch)
            if top_k is None:
                kept.append(logits.cpu())
                continue
            rows = [
                chunk.float().log_softmax(-1).topk(min(top_k, chunk.shape[-1]))
                for chunk in logits.flatten(0, -2).split(_CHUNK)
            ]
            shape = (*batch.shape, -1)
            log_probs = torch.cat([row.values.half().cpu() for row in rows]).view(shape)
            indices = torch.cat([row.indices.int().cpu() for row in rows]).view(shape)
            kept.append(TopLogits(log_probs, indices))
    finally:
        teacher.train(training)
    return kept


def check_teacher(teacher: Teacher | None, model: nn.Module, batches: Sequence[Tensor]) -> None:
    """Raise unless a teacher can be one.

    Raises:
        ValueError: if it is the model itself or shares parameters with it, or its logits are not those of the batches.
        TypeError: if it is neither a module nor a sequence of logits.
    """
    if teacher is None:
        return
    if isinstance(teacher, nn.Module):
        shared = set(map(id, model.parameters())) & set(map(id, teacher.parameters()))
        if teacher is model or shared:
            raise ValueError(
                "teacher is the model, or shares parameters with it, which tuning changes: pass a dense copy "
                "(copy.deepcopy before quantizing), its logits (teacher_logits), or None"
            )
        return
    if isinstance(teacher, Tensor) or not isinstance(teacher, Sequence):
        raise TypeError(
            f"teacher must be a module, a sequence of logits with one item for each batch, or None, got "
            f"{type(teacher).__name__}"
        )
    if len(teacher) != len(batches):
        raise ValueError(f"teacher has logits for {len(teacher)} batches, but there are {len(batches)}")
    for number, (item, batch) in enumerate(zip(teacher, batches, strict=True)):
        for part in item if isinstance(item, TopLogits) else (item,):
            if not isinstance(part, Tensor) or part.shape[:-1] != batch.shape:
                found = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
                raise ValueError(
                    f"teacher's logits of batch {number} must have shape [{', '.join(map(str, batch.shape))}, *], "
                    f"got {found}"
                )


def token_loss(logits: Tensor, batch: Tensor, target: Tensor | TopLogits | None) -> Tensor:
    """Mean loss in nats over the positions of a batch, a float32 scalar.

    Args:
        logits: the model's, [B, seqlen, vocabulary].
        batch: token ids, [B, seqlen].
        target: the teacher's logits, of the same vocabulary, for the Kullback-Leibler divergence of the model from the
            teacher; None for the negative log likelihood of the tokens from the second on.

    Raises:
        ValueError: if the vocabularies differ.
    """
    if target is None:
        parts: tuple[Tensor, ...] = (batch[:, 1:].to(logits.device, torch.int64),)
        logits, function = logits[:, :-1], _recomputed(_negative_log_likelihood)
    elif isinstance(target, TopLogits):
        parts, function = (target.log_probs, target.indices), _recomputed(_top_divergence)
    else:
        if target.shape != logits.shape:
            raise ValueError(
                f"the teacher's logits have shape {tuple(target.shape)}, the model's {tuple(logits.shape)}: they must "
                "be of the same vocabulary"
            )
        parts, function = (target,), _Divergence.apply
    rows = logits.flatten(0, 1)
    columns = [part.to(logits.device, non_blocking=True).flatten(0, 1) for part in parts]
    total = torch.zeros((), device=logits.device)
    with torch.autocast(logits.device.type, enabled=False):
        for start in range(0, len(rows), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            total = total + function(rows[chunk], *(column[chunk] for column in columns))
    return total / len(rows)


def _recomputed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that keeps only its operands for the backward pass."""
    return functools.partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)


class _Divergence(torch.autograd.Function):
    """Kullback-Leibler divergence of logits [N, vocabulary] from a teacher's, in nats, summed over N."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher: Tensor) -> Tensor:
        own, wanted = logits.float().log_softmax(-1), teacher.float().log_softmax(-1)
        likely = wanted.exp()
        total = wanted.sub_(own).mul_(likely).sum()
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(own.exp_().sub_(likely).to(logits.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        return difference * gradients[0], None


def _negative_log_likelihood(logits: Tensor, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.float(), tokens, reduction="sum")


def _top_divergence(logits: Tensor, log_probs: Tensor, indices: Tensor) -> Tensor:
    own = logits.float().log_softmax(-1).gather(-1, indices.long())
    wanted = log_probs.float()
    # the rest as one token; clamped, since rounding may leave nothing or less than nothing of it
    rest, own_rest = (1 - part.exp().sum(-1).clamp(max=1 - 1e-6) for part in (wanted, own))
    top = (wanted.exp() * (wanted - own)).sum()
    return top + (rest * (rest.log() - own_rest.log())).sum()
