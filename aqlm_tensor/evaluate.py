"""How good a language model is (perplexity) and how fast it answers (greedy generation).

Perplexity is measured as AQLM and GPTQ do, so numbers compare with theirs: the text is tokenized once, the tokens are
cut into windows of `seqlen` that do not overlap, and each window is predicted without what came before it. That is
cheaper than a sliding window and gives a higher value. It depends on the text, the tokenizer and `seqlen`: compare
only numbers that agree in all three.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Generation", "Perplexity", "generate", "perplexity", "windows"]

_CHUNK = 256  # positions whose logits are widened to float32 at a time


@dataclass(frozen=True)
class Perplexity:
    """A measured perplexity and what it was measured on.

    Attributes:
        perplexity: exp of the mean negative log likelihood, in nats, over all predicted tokens.
        windows: windows that were run.
        predicted: tokens that were predicted; the first of each window is not.
        dropped: tokens at the end that filled no window.
        seconds: wall time.
    """

    perplexity: float
    windows: int
    predicted: int
    dropped: int
    seconds: float


@dataclass(frozen=True)
class Generation:
    """What a model answered.

    Attributes:
        text: the new tokens, decoded without special tokens.
        tokens: how many new tokens.
        prompt_tokens: length of the prompt.
        seconds: wall time, reading of the prompt included.
        decode_seconds: the part of it after the first new token.
    """

    text: str
    tokens: int
    prompt_tokens: int
    seconds: float
    decode_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second after the first; nan if there was only one."""
        return (self.tokens - 1) / self.decode_seconds if self.tokens > 1 else float("nan")


def windows(tokens: Tensor, seqlen: int) -> Tensor:
    """Cut tokens [n] into windows [n // seqlen, seqlen]; the rest is dropped.

    A text shorter than `seqlen` is one window of its own length.

    Raises:
        ValueError: for `seqlen` below 2, fewer than 2 tokens, or tokens that are not one row of integers.
    """
    if tokens.dim() != 1 or tokens.is_floating_point():
        raise ValueError(f"tokens must be one row of integers, got {tokens.dtype} of shape {tuple(tokens.shape)}")
    if seqlen < 2:
        raise ValueError(f"seqlen must be at least 2, so that a window has a token to predict; got {seqlen}")
    if len(tokens) < 2:
        raise ValueError(f"at least 2 tokens are needed, the text has {len(tokens)}")
    length = min(seqlen, len(tokens))
    return tokens[: len(tokens) // length * length].view(-1, length)


@torch.inference_mode()
def perplexity(
    model: nn.Module, tokens: Tensor, seqlen: int, *, on_window: Callable[[int, int, float], None] | None = None
) -> Perplexity:
    """Perplexity of a causal language model over windows that do not overlap.

    Each window of `seqlen` tokens is one forward pass of its own; its tokens from the second on are predicted from
    those before them in the window. The last `n % seqlen` tokens are dropped, as in GPTQ and AQLM, unless the whole
    text is shorter than one window: then it is the window. Logits are reduced in float32, sums in float64.

    Args:
        model: maps token ids [1, seqlen] to logits [1, seqlen, vocabulary], or to an object with such `logits`.
        tokens: [n] integers.
        seqlen: tokens a window, at least 2.
        on_window: called with (windows done, windows in all, perplexity so far), for progress.

    Raises:
        ValueError: for tokens or a seqlen that make no window, or logits that are not finite.
    """
    batch = windows(tokens, seqlen)
    start = time.perf_counter()
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    total, so_far = 0.0, math.nan
    try:
        for number, window in enumerate(batch, 1):
            total += _negative_log_likelihood(model, window.to(device=device, dtype=torch.int64))
            so_far = math.exp(total / (number * (batch.shape[1] - 1)))
            if on_window is not None:
                on_window(number, len(batch), so_far)
    finally:
        model.train(training)
    predicted = batch.numel() - len(batch)
    return Perplexity(so_far, len(batch), predicted, len(tokens) - batch.numel(), time.perf_counter() - start)


def _negative_log_likelihood(model: nn.Module, window: Tensor) -> float:
    """Sum over the tokens of a window [n] but the first."""
    options = {"use_cache": False} if hasattr(model, "generation_config") else {}
    output = model(window[None], **options)
    logits = getattr(output, "logits", output)[0]
    total = torch.zeros((), dtype=torch.float64)
    for first in range(0, len(window) - 1, _CHUNK):
        targets = window[first + 1 : first + 1 + _CHUNK]
        chunk = logits[first : first + len(targets)].float()
        total += nn.functional.cross_entropy(chunk, targets, reduction="sum").double().cpu()
    if not math.isfinite(float(total)):
        raise ValueError(
            "the model's logits are not finite: it is damaged, or its dtype too narrow for its activations"
        )
    return float(total)


class _Clock:
    """A streamer that notes when the first new token came, and passes tokens on."""

    def __init__(self, streamer: Any) -> None:
        self.streamer = streamer
        self.calls = 0
        self.first = math.nan

    def put(self, value: Tensor) -> None:
        """Take the prompt (first call) or the next token."""
        self.calls += 1
        if self.calls == 2:
            self.first = time.perf_counter()
        if self.streamer is not None:
            self.streamer.put(value)

    def end(self) -> None:
        """Finish."""
        if self.streamer is not None:
            self.streamer.end()


def generate(
    model: Any, tokenizer: Any, prompt: str, *, max_new_tokens: int = 128, streamer: Any | None = None
) -> Generation:
    """Answer a prompt greedily; the prompt is put into the tokenizer's chat template if it has one.

    Args:
        model: a Transformers causal language model.
        tokenizer: its tokenizer.
        prompt: what the user says.
        max_new_tokens: stop there if the model does not stop before.
        streamer: a Transformers streamer that receives the tokens as they come.

    Raises:
        ValueError: for an empty prompt or max_new_tokens below 1.
    """
    if not prompt:
        raise ValueError("the prompt is empty: say something")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if tokenizer.chat_template:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
    clock = _Clock(streamer)
    start = time.perf_counter()
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, streamer=clock)
    end = time.perf_counter()
    prompt_tokens = inputs["input_ids"].shape[1]
    answer = output[0, prompt_tokens:]
    text = tokenizer.decode(answer, skip_special_tokens=True)
    return Generation(text, len(answer), prompt_tokens, end - start, end - clock.first)
