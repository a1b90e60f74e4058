"""Measured sensitivity against the divergence it stands for; mixed schemes through calibrate, save, load and fuse_."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from aqlm_tensor import AQLMTensor, AQLMWeightConfig, calibrate, fuse_, load, save
from aqlm_tensor.blocks import find_blocks, linears_of
from aqlm_tensor.calibration.sensitivity import allocate, measure_schemes
from aqlm_tensor.quantizer.observers import observer_of
from tests.models import QUICK

SCHEMES = ("1x4g8", "2x4g8", "4x4g8")
CONFIG = AQLMWeightConfig("2x4g8", solver=QUICK)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """A Llama with logits that depend on the text, and one block that matters much less than the other."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        initializer_range=0.08,
    )
    model = LlamaForCausalLM(config).eval()
    second: Any = model.model.layers[1]
    with torch.no_grad():
        for layer in (second.self_attn.o_proj, second.mlp.down_proj):
            layer.weight.mul_(0.05)
    return model


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    tokens = torch.randint(61, (64, 32), generator=torch.Generator().manual_seed(1))
    return list(tokens.split(8))


@torch.no_grad()
def divergence(dense: nn.Module, other: nn.Module, batches: list[Tensor]) -> float:
    """KL(dense, other) in nats a token, in float64."""
    total = 0.0
    for batch in batches:
        teacher, student = (model(batch).logits.double().log_softmax(-1) for model in (dense, other))
        total += float((teacher.exp() * (teacher - student)).sum())
    return total / sum(batch.numel() for batch in batches)


def test_losses_are_the_divergence_that_small_errors_cause(model: LlamaForCausalLM, batches: list[Tensor]) -> None:
    groups = measure_schemes(model, CONFIG, batches, SCHEMES, windows=64, siblings=())
    found, expected = [], []
    for group in groups:
        assert [choice.scheme for choice in group.choices] == list(SCHEMES)
        choice = group.choices[-1]  # the smallest error: second order is all there is
        other = copy.deepcopy(model)
        layer = other.get_submodule(group.fqns[0])
        dense: Any = layer.weight
        weight = AQLMTensor.from_hp(dense.detach(), choice.scheme, seed=0).dequantize()
        relative = float((weight - dense.detach()).square().sum() / dense.detach().square().sum())
        layer.weight = nn.Parameter(weight)
        # that weight was found without data: its own error scales the loss
        found.append(choice.loss / choice.error * relative)
        expected.append(divergence(model, other, batches))
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (found, expected)]
    assert float(torch.corrcoef(torch.stack(ranks))[0, 1]) > 0.9
    ratios = torch.tensor(found) / torch.tensor(expected)
    assert 0.5 < float(ratios.median()) < 2.0


def test_the_model_is_left_as_it_was(model: LlamaForCausalLM, batches: list[Tensor]) -> None:
    before = copy.deepcopy(model.state_dict())
    model.train()
    measure_schemes(model, CONFIG, batches[:2], SCHEMES[:1], windows=8)
    assert model.training
    model.eval()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(
        observer_of(module) or module._forward_hooks or module._forward_pre_hooks for module in model.modules()
    )


def test_measured_twice_is_the_same(model: LlamaForCausalLM, batches: list[Tensor]) -> None:
    one, other = (measure_schemes(model, CONFIG, batches[:2], SCHEMES[:2], windows=8) for _ in range(2))
    assert one == other


def test_siblings_and_shared_weights_get_one_scheme(model: LlamaForCausalLM, batches: list[Tensor]) -> None:
    shared = copy.deepcopy(model)
    first, second = (shared.get_submodule(f"model.layers.{index}.mlp.down_proj") for index in range(2))
    second.weight = first.weight
    groups = measure_schemes(shared, CONFIG, batches[:1], SCHEMES[:2], windows=8)
    assert [tuple(fqn.removeprefix("model.layers.") for fqn in group.fqns) for group in groups] == [
        ("0.self_attn.q_proj", "0.self_attn.k_proj", "0.self_attn.v_proj"),
        ("0.self_attn.o_proj",),
        ("0.mlp.gate_proj", "0.mlp.up_proj"),
        ("0.mlp.down_proj", "1.mlp.down_proj"),
        ("1.self_attn.q_proj", "1.self_attn.k_proj", "1.self_attn.v_proj"),
        ("1.self_attn.o_proj",),
        ("1.mlp.gate_proj", "1.mlp.up_proj"),
    ]
    assert groups[3].weights == 64 * 96


def test_mixed_schemes_calibrate_save_load_and_fuse(
    model: LlamaForCausalLM, batches: list[Tensor], tmp_path: Path
) -> None:
    quantized = copy.deepcopy(model)
    steps: list[tuple[int, int]] = []
    allocation = allocate(
        quantized, CONFIG, batches, 5.0, SCHEMES, windows=16, on_progress=lambda *step: steps.append(step)
    )
    assert steps == [(step, 4) for step in range(1, 5)]
    report = calibrate(quantized, allocation.config(CONFIG), batches)
    assert {layer.fqn: layer.scheme for layer in report.layers} == allocation.schemes
    weights = sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
    bits = sum(layer.bits_per_weight * layer.shape[0] * layer.shape[1] for layer in report.layers)
    assert bits / weights == pytest.approx(allocation.bits_per_weight)
    assert len(set(allocation.schemes.values())) > 1
    first = allocation.schemes["model.layers.0.self_attn.o_proj"]
    assert first >= allocation.schemes["model.layers.1.self_attn.o_proj"], "the block that matters more gets more"
    save(quantized, tmp_path / "mixed")
    loaded: Any = load(copy.deepcopy(model), tmp_path / "mixed")
    assert {
        fqn: str(layer.weight.scheme)
        for fqn, layer in loaded.named_modules()
        if isinstance(layer, nn.Linear) and isinstance(layer.weight, AQLMTensor)
    } == allocation.schemes
    with torch.no_grad():
        assert torch.equal(loaded(batches[0]).logits, quantized(batches[0]).logits)
        fused = fuse_(loaded)
        assert len(fused.fused) == 4
        assert not fused.skipped
        torch.testing.assert_close(loaded(batches[0]).logits, quantized(batches[0]).logits)


def test_layers_outside_of_the_blocks_are_named(model: LlamaForCausalLM, batches: list[Tensor]) -> None:
    allocation = allocate(model, CONFIG, batches[:1], 6.0, SCHEMES[:2], windows=8)
    quantized = copy.deepcopy(model)
    report = calibrate(quantized, allocation.config(CONFIG), batches[:1], blocks=list(find_blocks(quantized))[:1])
    assert len(report.layers) == 7
    assert report.skipped["model.layers.1.mlp.up_proj"] == "it is in none of the blocks"
    assert not any(isinstance(layer.weight, AQLMTensor) for layer in linears_of([find_blocks(quantized)[1]]))


def test_bad_requests_are_refused_before_the_work(model: LlamaForCausalLM, batches: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="1 bits a weight cannot be reached"):
        allocate(model, CONFIG, batches, 1.0, SCHEMES)
    with pytest.raises(ValueError, match=r"none of the schemes 1x16g8 fits any layer"):
        measure_schemes(model, CONFIG, batches, ["1x16g8"])
    with pytest.raises(ValueError, match=r"batches must be token ids"):
        measure_schemes(model, CONFIG, [batches[0][0]], SCHEMES)
