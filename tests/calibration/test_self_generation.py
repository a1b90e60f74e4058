"""Text that a model writes itself: what is random and what is not, ends of texts, models with and without a cache."""

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from aqlm_tensor.calibration.self_generation import GeneratedData, generate_windows

VOCABULARY = 12


class Bigram(nn.Module):
    """Logits that depend on the last token only; no cache."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(logits)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table[tokens]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
        eos_token_id=7,
    )
    return LlamaForCausalLM(config).eval()


def test_windows_are_seeded_and_leave_the_mode_of_the_model_alone() -> None:
    model = llama().train()
    config = GeneratedData(batch_size=2)
    one = generate_windows(model, 5, 20, config, seed=1)
    assert model.training
    assert [window.shape for window in one] == [(1, 20)] * 5
    assert torch.equal(torch.cat(one), torch.cat(generate_windows(model, 5, 20, config, seed=1)))
    assert not torch.equal(torch.cat(one), torch.cat(generate_windows(model, 5, 20, config, seed=2)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_windows_are_seeded_on_a_gpu_and_come_back() -> None:
    model, config = llama(), GeneratedData(batch_size=2)
    nn.Module.cuda(model)
    one, again, other = (torch.cat(generate_windows(model, 5, 20, config, seed=seed)) for seed in (1, 1, 2))
    assert one.device.type == "cpu"
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    generate_windows(Bigram(torch.zeros(VOCABULARY, VOCABULARY)), 2, 8)
    assert torch.equal(torch.get_rng_state(), before)


def test_first_tokens_are_greedy_and_later_ones_have_the_distribution_of_the_model() -> None:
    logits = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0))
    windows = torch.cat(generate_windows(Bigram(logits), 64, 400, GeneratedData(greedy_tokens=3, batch_size=64)))
    for position in range(1, 4):
        assert torch.equal(windows[:, position], logits[windows[:, position - 1]].argmax(1))
    assert len(windows[:, 0].unique()) == VOCABULARY
    previous, following = windows[:, 4:-1].flatten(), windows[:, 5:].flatten()
    counts = torch.zeros(VOCABULARY, VOCABULARY).index_put_((previous, following), torch.ones(()), accumulate=True)
    expected = counts.sum(1, keepdim=True) * logits.softmax(1)
    assert float(((counts - expected) / expected.sqrt().clamp_min(1)).abs().max()) < 5  # standard deviations


def test_temperature_sharpens() -> None:
    logits = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0))
    windows = torch.cat(generate_windows(Bigram(logits), 8, 100, GeneratedData(temperature=1e-3)))
    assert torch.equal(windows[:, 1:], logits[windows[:, :-1]].argmax(2))


def test_after_the_end_of_a_text_another_one_starts() -> None:
    model = llama()
    end = model.generation_config.eos_token_id
    windows = torch.cat(generate_windows(model, 64, 40, GeneratedData(greedy_tokens=0, batch_size=64)))
    after = windows[:, 1:][windows[:, :-1] == end]
    assert len(after) > 50
    assert len(after.unique()) > VOCABULARY // 2  # from all of the vocabulary, whatever the model would say


def test_a_cache_changes_nothing_but_the_time() -> None:
    model = llama()

    class WithoutCache(nn.Module):
        generation_config = model.generation_config

        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, tokens: Tensor, **_options: object) -> Tensor:
            return self.inner(tokens, use_cache=False).logits

    config = GeneratedData(temperature=1e-4)
    cached, plain = (torch.cat(generate_windows(m, 4, 30, config, seed=5)) for m in (model, WithoutCache()))
    assert torch.equal(cached, plain)


def test_progress_counts_tokens() -> None:
    seen: list[tuple[int, int]] = []
    model = Bigram(torch.zeros(VOCABULARY, VOCABULARY))
    generate_windows(model, 3, 4, GeneratedData(batch_size=2), on_token=lambda done, total: seen.append((done, total)))
    assert seen == [(4, 12), (6, 12), (8, 12), (10, 12), (11, 12), (12, 12)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"greedy_tokens": -1}, "greedy_tokens must be at least 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_senseless_settings_are_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GeneratedData(**fields)  # pyright: ignore[reportArgumentType]


def test_senseless_numbers_and_damaged_models_are_refused() -> None:
    model = Bigram(torch.full((VOCABULARY, VOCABULARY), torch.nan))
    with pytest.raises(ValueError, match="seqlen at least 2, got 1 and 1"):
        generate_windows(model, 1, 1)
    with pytest.raises(ValueError, match="logits are not finite"):
        generate_windows(model, 1, 4)
