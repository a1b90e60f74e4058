"""Perplexity against a float64 computation by hand, windows, and greedy generation."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aqlm_tensor.evaluate import perplexity, windows

VOCABULARY = 37


class Bigram(nn.Module):
    """Logits depend on the current token alone, so that windows can be checked by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, dtype=torch.float64) * 2)
        self.lengths: list[int] = []
        self.modes: list[bool] = []

    def forward(self, tokens: Tensor) -> Tensor:
        self.lengths.append(tokens.shape[1])
        self.modes.append(self.training)
        return self.table[tokens].float()


def by_hand(model: Bigram, tokens: list[int], seqlen: int) -> float:
    log_probabilities = model.table.detach().log_softmax(-1)
    losses = [
        -float(log_probabilities[tokens[position - 1], tokens[position]])
        for position in range(len(tokens) // seqlen * seqlen)
        if position % seqlen
    ]
    return math.exp(math.fsum(losses) / len(losses))


@pytest.mark.parametrize(("count", "seqlen"), [(1000, 100), (1057, 100), (700, 300), (64, 2), (1201, 601)])
def test_perplexity_is_that_of_the_definition(count: int, seqlen: int) -> None:
    model = Bigram()
    tokens = torch.randint(VOCABULARY, (count,))
    result = perplexity(model, tokens, seqlen)
    assert result.perplexity == pytest.approx(by_hand(model, tokens.tolist(), seqlen), rel=1e-6)
    assert result.windows == count // seqlen
    assert result.predicted == result.windows * (seqlen - 1)
    assert result.dropped == count % seqlen
    assert model.lengths == [seqlen] * result.windows


def test_text_shorter_than_a_window_is_one_window() -> None:
    model = Bigram()
    tokens = torch.randint(VOCABULARY, (50,))
    result = perplexity(model, tokens, 2048)
    assert (result.windows, result.predicted, result.dropped) == (1, 49, 0)
    assert result.perplexity == pytest.approx(by_hand(model, tokens.tolist(), 50), rel=1e-6)


def test_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    model = Bigram()
    model.table.data.zero_()
    assert perplexity(model, torch.arange(30), 10).perplexity == pytest.approx(VOCABULARY, rel=1e-6)


def test_evaluation_mode_inside_and_the_old_mode_afterwards() -> None:
    model = Bigram().train()
    perplexity(model, torch.arange(30), 10)
    assert model.training
    assert model.modes == [False] * 3


def test_progress_reports_each_window_and_ends_at_the_result() -> None:
    model = Bigram()
    seen: list[tuple[int, int, float]] = []
    result = perplexity(model, torch.arange(35), 10, on_window=lambda *report: seen.append(report))
    assert [(done, total) for done, total, _ in seen] == [(1, 3), (2, 3), (3, 3)]
    assert seen[-1][2] == result.perplexity


def test_objects_with_logits_and_half_precision_are_accepted() -> None:
    class Wrapped(nn.Module):
        def __init__(self, inner: Bigram) -> None:
            super().__init__()
            self.inner = inner
            self.generation_config = object()

        def forward(self, tokens: Tensor, use_cache: bool) -> Any:
            assert not use_cache
            return SimpleNamespace(logits=self.inner(tokens).bfloat16())

    inner = Bigram()
    tokens = torch.randint(VOCABULARY, (400,))
    result = perplexity(Wrapped(inner), tokens, 100)
    assert result.perplexity == pytest.approx(by_hand(inner, tokens.tolist(), 100), rel=0.02)


@pytest.mark.parametrize(
    ("tokens", "seqlen", "message"),
    [
        (torch.arange(10), 1, "seqlen must be at least 2"),
        (torch.arange(1), 5, "at least 2 tokens"),
        (torch.arange(10).view(2, 5), 5, "one row of integers"),
        (torch.rand(10), 5, "one row of integers"),
    ],
)
def test_bad_input(tokens: Tensor, seqlen: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        perplexity(Bigram(), tokens, seqlen)


def test_logits_that_are_not_finite_are_an_error() -> None:
    model = Bigram()
    model.table.data[3] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        perplexity(model, torch.arange(30), 10)
    assert model.training


def test_windows_do_not_overlap_and_keep_the_order() -> None:
    assert windows(torch.arange(11), 5).tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
