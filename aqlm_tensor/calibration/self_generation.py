"""Calibration text that a language model writes itself, for when no text is at hand.

As in LLM-QAT (Liu et al. 2023, arXiv 2305.17888, section 2.1) a window starts with a random token of the vocabulary,
goes on with a few most likely tokens, so that it finds into sensible text, and is sampled from there on at temperature
1, which is the distribution that the model was trained to have. Where the model ends its text, the next one starts in
the same way within the window.

A chat model that has seen prose alone while it was quantized forgets how to answer before it forgets its language. So
half of what it writes are conversations in its chat template, of which it writes the questions, too (as in Magpie, Xu
et al. 2024, arXiv 2406.08464: given what comes before a user's words, a model goes on with these).

It takes one forward pass per token of a window, so it is much slower than reading a text, and it shows the layers what
the model says rather than what it will be asked. On SmolLM2 it keeps about nine tenths of what calibration on the right
text gains over none (benchmarks/README.md).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["GeneratedData", "generate_windows", "interleaved"]

_T = TypeVar("_T")
_QUESTION, _ANSWER = "qqquestionqq", "aaansweraa"  # words that no chat template has


@dataclass(frozen=True)
class GeneratedData:
    """How a model writes its own calibration data.

    Attributes:
        temperature: of the sampling; 1 is the model's own distribution, less is closer to its most likely text.
        greedy_tokens: most likely tokens after each random first one, before sampling begins.
        batch_size: windows written at once; more are faster and take more memory. Part of what the seed determines.
        conversations: share of the windows that are conversations, if there is a tokenizer with a chat template.
        question_tokens: of a question, at most.
        answer_tokens: of an answer, at most; an answer is the most likely one.

    Raises:
        ValueError: for a value that makes no sense, naming the accepted ones.
    """

    temperature: float = 1.0
    greedy_tokens: int = 4
    batch_size: int = 16
    conversations: float = 0.5
    question_tokens: int = 32
    answer_tokens: int = 64

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if self.greedy_tokens < 0:
            raise ValueError(f"greedy_tokens must be at least 0, got {self.greedy_tokens}")
        for name in ("batch_size", "question_tokens", "answer_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.conversations <= 1:
            raise ValueError(f"conversations must lie in [0, 1], got {self.conversations}")


@torch.no_grad()
def generate_windows(
    model: nn.Module,
    nsamples: int,
    seqlen: int,
    config: GeneratedData = GeneratedData(),
    *,
    tokenizer: Any | None = None,
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
        tokenizer: of a Transformers model; only if it has a chat template are there conversations.
        seed: of all random choices; the same seed, device and config give the same windows.
        on_token: called with (tokens written, tokens in all), for progress.

    Returns:
        `nsamples` windows [1, seqlen], int64 on the CPU.

    Raises:
        ValueError: for numbers below those minima, logits that are not finite, or a chat template from which questions
            and answers cannot be told.
    """
    if nsamples < 1 or seqlen < 2:
        raise ValueError(f"nsamples must be at least 1 and seqlen at least 2, got {nsamples} and {seqlen}")
    turns = None if getattr(tokenizer, "chat_template", None) is None else _turns(tokenizer)
    chats = 0 if turns is None else round(config.conversations * nsamples)
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    training = model.training
    model.eval()
    done: list[Tensor] = []
    try:
        while len(done) < nsamples:
            writer = _Writer(model, config, generator)
            count = min(config.batch_size, (chats if len(done) < chats else nsamples) - len(done))
            before = len(done) * seqlen

            def show(columns: int, before: int = before, count: int = count) -> None:
                if on_token is not None:
                    on_token(before + count * columns, nsamples * seqlen)

            if turns is not None and before < chats * seqlen:
                done += writer.converse(turns, count, seqlen, show).split(1)
            else:
                done += writer.write(count, seqlen, show).split(1)
    finally:
        model.train(training)
    return interleaved(done[:chats], done[chats:])


def interleaved(*parts: Sequence[_T]) -> list[_T]:
    """Several sequences in one, each spread evenly over it."""
    placed = [((index + 0.5) / len(part), item) for part in parts for index, item in enumerate(part)]
    return [item for _, item in sorted(placed, key=lambda pair: pair[0])]


@dataclass(frozen=True)
class _Turns:
    """Token ids that a chat template puts before a question, between question and answer, and after the answer."""

    before: list[int]
    between: list[int]
    after: list[int]


def _turns(tokenizer: Any) -> _Turns:
    said = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    text = tokenizer.apply_chat_template(said, tokenize=False)
    if text.count(_QUESTION) != 1 or text.count(_ANSWER) != 1 or text.index(_QUESTION) > text.index(_ANSWER):
        raise ValueError(
            f"the chat template makes {text!r} of a question and an answer, from which conversations cannot be "
            "written: pass GeneratedData(conversations=0)"
        )
    before, _, rest = text.partition(_QUESTION)
    between, _, after = rest.partition(_ANSWER)
    parts = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, between, after)]
    if not parts[2] and tokenizer.eos_token_id is not None:
        parts[2] = [tokenizer.eos_token_id]
    return _Turns(*parts)


@dataclass
class _Conversation:
    """Where one window is: tokens of the template that are still to come, and those of the turn so far."""

    turns: _Turns
    config: GeneratedData
    given: list[int]
    answering: bool = False
    length: int = 0

    def next(self, sampled: int, likeliest: int, ends: set[int]) -> int:
        """The next token, given what the model proposes."""
        if not self.given:
            chosen = likeliest if self.answering else sampled
            longest = self.config.answer_tokens if self.answering else self.config.question_tokens
            closing = [*self.turns.after, *self.turns.before] if self.answering else self.turns.between
            if chosen not in (*ends, *closing[:1]) and self.length < longest:
                self.length += 1
                return chosen
            self.given, self.answering, self.length = list(closing), not self.answering, 0
        return self.given.pop(0)


class _Writer:
    """Writes one batch of windows."""

    def __init__(self, model: nn.Module, config: GeneratedData, generator: torch.Generator) -> None:
        self.model, self.config, self.generator = model, config, generator
        self.device = generator.device
        self.transformers = hasattr(model, "generation_config")
        self.ends = _end_tokens(model).to(self.device)
        self.cache: Any = None

    def write(self, count: int, seqlen: int, on_column: Callable[[int], None]) -> Tensor:
        """The windows [count, seqlen]; `on_column` gets the number of columns so far."""
        tokens = torch.zeros(count, seqlen, dtype=torch.int64, device=self.device)
        vocabulary = self._next_logits(tokens[:, :1]).shape[1]
        self.cache = None
        tokens[:, 0] = self._random(count, vocabulary)
        age = torch.zeros(count, dtype=torch.int64, device=self.device)  # tokens since the start of the text
        for position in range(1, seqlen):
            logits = self._next_logits(tokens[:, :position])
            chosen = torch.where(age < self.config.greedy_tokens, logits.argmax(1), self._sample(logits))
            ended = torch.isin(tokens[:, position - 1], self.ends)
            tokens[:, position] = torch.where(ended, self._random(count, vocabulary), chosen)
            age = torch.where(ended, 0, age + 1)
            on_column(position + 1)
        return tokens.cpu()

    def converse(self, turns: _Turns, count: int, seqlen: int, on_column: Callable[[int], None]) -> Tensor:
        """Windows [count, seqlen] of conversations, one after another."""
        tokens = torch.full((count, seqlen), turns.before[0], device=self.device)
        rows = [_Conversation(turns, self.config, turns.before[1:]) for _ in range(count)]
        ends = set(self.ends.tolist())
        for position in range(1, seqlen):
            logits = self._next_logits(tokens[:, :position])
            pairs = zip(rows, self._sample(logits).tolist(), logits.argmax(1).tolist(), strict=True)
            chosen = [row.next(sample, best, ends) for row, sample, best in pairs]
            tokens[:, position] = torch.tensor(chosen, device=self.device)
            on_column(position + 1)
        return tokens.cpu()

    def _random(self, count: int, vocabulary: int) -> Tensor:
        return torch.randint(vocabulary, (count,), generator=self.generator, device=self.device)

    def _sample(self, logits: Tensor) -> Tensor:
        probabilities = torch.softmax(logits / self.config.temperature, 1)
        return torch.multinomial(probabilities, 1, generator=self.generator)[:, 0]

    def _next_logits(self, tokens: Tensor) -> Tensor:
        """Logits [B, vocabulary], float32, of what follows tokens [B, n]."""
        given = tokens if self.cache is None else tokens[:, -1:]
        options = {"past_key_values": self.cache, "use_cache": True} if self.transformers else {}
        output = self.model(given, **options)
        self.cache = getattr(output, "past_key_values", None)
        logits = getattr(output, "logits", output)[:, -1].float()
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
