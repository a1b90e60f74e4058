"""Calibration text that a language model writes itself, for when no text is at hand.

As in LLM-QAT (Liu et al. 2023, arXiv 2305.17888, section 2.1) a window starts with a random token of the vocabulary,
goes on with a few most likely tokens, so that it finds into sensible text, and is sampled from there on at temperature
1, which is the distribution that the model was trained to have. Where the model ends its text, the next one starts in
the same way within the window.

It takes one forward pass per token of a window, so it is much slower than reading a text, and it shows the layers what
the model says rather than what it will be asked. On SmolLM2 it keeps about nine tenths of what calibration on the right
text gains over none (benchmarks/README.md).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["GeneratedData", "generate_windows"]


@dataclass(frozen=True)
class GeneratedData:
    """How a model writes its own calibration data.

    Attributes:
        temperature: of the sampling; 1 is the model's own distribution, less is closer to its most likely text.
        greedy_tokens: most likely tokens after each random first one, before sampling begins.
        batch_size: windows written at once; more are faster and take more memory. Part of what the seed determines.

    Raises:
        ValueError: for a value that makes no sense, naming the accepted ones.
    """

    temperature: float = 1.0
    greedy_tokens: int = 4
    batch_size: int = 16

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if self.greedy_tokens < 0:
            raise ValueError(f"greedy_tokens must be at least 0, got {self.greedy_tokens}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")


@torch.no_grad()
def generate_windows(
    model: nn.Module,
    nsamples: int,
    seqlen: int,
    config: GeneratedData = GeneratedData(),
    *,
    seed: int = 0,
    on_token: Callable[[int, int], None] | None = None,
) -> list[Tensor]:
    """Let a causal language model write token windows.

    Args:
        model: maps token ids [B, n] to logits [B, n, vocabulary] or an object with such `logits`. If that object has
            `past_key_values`, as in Transformers, each pass reads one token; otherwise the whole window so far.
        nsamples: windows to write, at least 1.
        seqlen: tokens a window, at least 2.
        config: how.
        seed: of all random choices; the same seed, device and config give the same windows.
        on_token: called with (tokens written, tokens in all), for progress.

    Returns:
        `nsamples` windows [1, seqlen], int64 on the CPU.

    Raises:
        ValueError: for numbers below those minima, or logits that are not finite.
    """
    if nsamples < 1 or seqlen < 2:
        raise ValueError(f"nsamples must be at least 1 and seqlen at least 2, got {nsamples} and {seqlen}")
    generator = torch.Generator().manual_seed(seed)
    training = model.training
    model.eval()
    done: list[Tensor] = []
    try:
        while len(done) < nsamples:
            count = min(config.batch_size, nsamples - len(done))
            before = len(done) * seqlen

            def show(columns: int, before: int = before, count: int = count) -> None:
                if on_token is not None:
                    on_token(before + count * columns, nsamples * seqlen)

            done += _Writer(model, config, generator).write(count, seqlen, show).split(1)
    finally:
        model.train(training)
    return done


class _Writer:
    """Writes one batch of windows."""

    def __init__(self, model: nn.Module, config: GeneratedData, generator: torch.Generator) -> None:
        self.model, self.config, self.generator = model, config, generator
        self.device = next(model.parameters()).device
        self.transformers = hasattr(model, "generation_config")
        self.ends = _end_tokens(model)
        self.cache: Any = None

    def write(self, count: int, seqlen: int, on_column: Callable[[int], None]) -> Tensor:
        """The windows [count, seqlen]; `on_column` gets the number of columns so far."""
        tokens = torch.zeros(count, seqlen, dtype=torch.int64)
        vocabulary = self._next_logits(tokens[:, :1]).shape[1]
        self.cache = None
        tokens[:, 0] = self._random(count, vocabulary)
        age = torch.zeros(count, dtype=torch.int64)  # tokens since the start of the text
        for position in range(1, seqlen):
            logits = self._next_logits(tokens[:, :position])
            chosen = torch.where(age < self.config.greedy_tokens, logits.argmax(1), self._sample(logits))
            ended = torch.isin(tokens[:, position - 1], self.ends)
            tokens[:, position] = torch.where(ended, self._random(count, vocabulary), chosen)
            age = torch.where(ended, 0, age + 1)
            on_column(position + 1)
        return tokens

    def _random(self, count: int, vocabulary: int) -> Tensor:
        return torch.randint(vocabulary, (count,), generator=self.generator)

    def _sample(self, logits: Tensor) -> Tensor:
        probabilities = torch.softmax(logits / self.config.temperature, 1)
        return torch.multinomial(probabilities, 1, generator=self.generator)[:, 0]

    def _next_logits(self, tokens: Tensor) -> Tensor:
        """Logits [B, vocabulary], float32 on the CPU, of what follows tokens [B, n]."""
        given = tokens if self.cache is None else tokens[:, -1:]
        options = {"past_key_values": self.cache, "use_cache": True} if self.transformers else {}
        output = self.model(given.to(self.device), **options)
        self.cache = getattr(output, "past_key_values", None)
        logits = getattr(output, "logits", output)[:, -1].float().cpu()
        if not bool(logits.isfinite().all()):
            raise ValueError(
                "the model's logits are not finite, so it cannot write calibration data: it is damaged, or its dtype "
                "too narrow"
            )
        return logits


def _end_tokens(model: nn.Module) -> Tensor:
    """Token ids that end a text, [n]; none for models that do not say."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return torch.tensor([] if ends is None else [ends] if isinstance(ends, int) else list(ends), dtype=torch.int64)
