"""Conversations that a chat model writes itself: template, sampled questions, likeliest answers; mixtures."""

from typing import Any

import pytest
import torch
from torch import Tensor

from aqlm_tensor.calibration.self_generation import GeneratedData, generate_windows, interleaved
from aqlm_tensor.calibration.sources import Mixture, calibration_data, parse_source, windows_written
from tests.calibration.test_self_generation import VOCABULARY, Bigram

USER, END, ASSISTANT = 0, 1, 2


class Chat:
    """A tokenizer of a template that puts one token before a question, and ends both turns alike."""

    chat_template = "some Jinja"
    eos_token_id = END
    said = "U{question}EA{answer}E"

    def apply_chat_template(self, said: list[dict[str, str]], *, tokenize: bool) -> str:
        assert not tokenize
        return self.said.format(question=said[0]["content"], answer=said[1]["content"])

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [{"U": USER, "E": END, "A": ASSISTANT}[letter] for letter in text]}


def logits() -> Tensor:
    """Those of a model that says tokens from 3 on, and now and then ends its turn."""
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0))
    table[:, [USER, ASSISTANT]] = -30
    table[:, END] = -1.0
    return table


def turns(window: Tensor) -> tuple[list[list[int]], list[list[int]]]:
    """Questions and answers, the last one of each perhaps cut off; asserts that the template is around them."""
    questions, answers = [], []
    rest = window.tolist()
    while rest:
        assert rest.pop(0) == USER
        for found, following in ((questions, ASSISTANT), (answers, None)):
            length = rest.index(END) if END in rest else len(rest)
            found.append(rest[:length])
            rest = rest[length + 1 :]
            if not rest:
                return questions, answers
            if following is not None:
                assert rest.pop(0) == following
    return questions, answers


def test_questions_are_sampled_and_answers_the_likeliest() -> None:
    table = logits()
    config = GeneratedData(conversations=1.0, question_tokens=4, answer_tokens=6, batch_size=8)
    windows = generate_windows(Bigram(table), 20, 61, config, tokenizer=Chat(), seed=3)
    assert [window.shape for window in windows] == [(1, 61)] * 20
    again = generate_windows(Bigram(table), 20, 61, config, tokenizer=Chat(), seed=3)
    assert torch.equal(torch.cat(windows), torch.cat(again))
    found = [turns(window[0]) for window in windows]
    questions = [tuple(question) for asked, _ in found for question in asked[:-1]]
    answers = [answer for _, answered in found for answer in answered[:-1]]
    assert len(questions) > 60
    assert len(set(questions)) > 0.5 * len(questions)
    assert max(map(len, questions)) == 4
    assert min(map(len, questions)) < 4, "some ended by themselves"
    likeliest = table.argmax(1).tolist()
    for answer in answers:
        said, expected = ASSISTANT, []
        while len(expected) < 6 and likeliest[said] != END:
            said = likeliest[said]
            expected.append(said)
        assert answer == expected


def test_half_of_what_a_chat_model_generates_are_conversations() -> None:
    model = Bigram(logits())
    windows = generate_windows(model, 7, 24, GeneratedData(question_tokens=4), tokenizer=Chat())
    chats = [bool(window[0, 0] == USER and (window == ASSISTANT).any()) for window in windows]
    assert chats == [True, False, True, False, True, False, True]
    plain = GeneratedData(conversations=0)
    without = generate_windows(model, 7, 24, plain, tokenizer=Chat())
    assert torch.equal(torch.cat(without), torch.cat(generate_windows(model, 7, 24)))


def test_sources_that_mix(tmp_path: Any) -> None:
    for name in ("tokens.pt", "a+b.pt"):
        torch.save(torch.arange(3, 12).repeat(20), tmp_path / name)
    assert not isinstance(parse_source(f"{tmp_path / 'a+b.pt'}"), Mixture), "a file's name may have a plus"
    source = parse_source(f"{tmp_path / 'tokens.pt'}+conversations")
    assert isinstance(source, Mixture)
    assert windows_written(source, 5) == 2
    options: dict[str, Any] = {"model": Bigram(logits()), "tokenizer": Chat(), "nsamples": 5, "seqlen": 12}
    data = calibration_data(source, **options)
    assert [bool(batch[0, 0] == USER) for batch in data.batches] == [False, True, False, True, False]
    assert [one["kind"] for one in data.provenance["sources"]] == ["tokens", "generated"]
    assert data.provenance["tokens"] == 60
    with pytest.raises(ValueError, match="1 windows cannot come from 2 sources"):
        calibration_data(source, **{**options, "nsamples": 1})
    with pytest.raises(ValueError, match="needs a tokenizer with a chat template"):
        calibration_data("conversations", **{**options, "tokenizer": None})
    assert interleaved([1, 2, 3], [4]) == [1, 2, 4, 3]


def test_templates_and_settings_that_cannot_be() -> None:
    class Deaf(Chat):
        said = "UEA{answer}E"

    with pytest.raises(ValueError, match=r"the chat template makes .*GeneratedData\(conversations=0\)"):
        generate_windows(Bigram(logits()), 2, 8, tokenizer=Deaf())
    with pytest.raises(ValueError, match=r"conversations must lie in \[0, 1\]"):
        GeneratedData(conversations=1.5)
    with pytest.raises(ValueError, match="answer_tokens must be at least 1"):
        GeneratedData(answer_tokens=0)
