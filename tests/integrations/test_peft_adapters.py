"""LoRA adapters on AQLM layers: switched, mixed, merged and unmerged, saved and loaded, merged into codes again."""

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn
from torch.nn import functional as F

from aqlm_tensor import AQLMTensor, SolverConfig
from aqlm_tensor.integrations.peft_lora import merge_and_requantize
from tests.integrations.peft_twins import (
    DORA,
    PISSA,
    TOKENS,
    adapted,
    aqlm_llama,
    codes_of,
    dense_twin,
    each_kind,
    logits,
    lora_config,
    perturb,
    q_proj,
    share_adapter,
    trained,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT uses what Transformers deprecates


def _add(model: Any, name: str, **options: Any) -> None:
    model.add_adapter(name, lora_config(**options))
    model.set_adapter(name)
    perturb(model, seed=4)


def test_merged_layer_is_the_dequantized_weight_plus_the_product() -> None:
    model = trained()
    layer = q_proj(model)
    weight = layer.base_layer.weight.dequantize().double()
    product = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    expected = weight + layer.scaling["default"] * product
    merged = q_proj(model.merge_and_unload())
    assert type(merged) is nn.Linear
    assert type(merged.weight) is nn.Parameter
    assert (merged.weight.double() - expected).abs().max() <= 2**-23 * expected.abs().max()


def test_bias_of_the_adapter_is_merged_and_restored_exactly() -> None:
    model = adapted(aqlm_llama(), LoraConfig(target_modules=["q_proj"], lora_bias=True))
    perturb(model, size=0.3)
    bias = q_proj(model).base_layer.bias.clone()
    model.merge_adapter()
    assert not torch.equal(q_proj(model).base_layer.bias, bias)
    model.unmerge_adapter()
    assert torch.equal(q_proj(model).base_layer.bias, bias)


@each_kind
def test_several_adapters_switch_mix_and_go(kind: dict[str, Any]) -> None:
    model = trained()
    alone = logits(model)
    _add(model, "other", **kind)
    other = logits(model)
    assert (other - alone).abs().max() > 1e-3
    model.set_adapter("default")
    assert torch.equal(logits(model), alone)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(aqlm_llama()))
    if kind != DORA:  # PEFT has no mixed batches for DoRA
        with torch.no_grad():
            mixed = model(input_ids=TOKENS, adapter_names=["default", "other"]).logits
        torch.testing.assert_close(mixed, torch.stack([alone[0], other[1]]))
    model.delete_adapter("other")
    assert torch.equal(logits(model), alone)
    assert not getattr(q_proj(model), "aqlm_initial", None)


@each_kind
def test_two_adapters_merge_as_into_a_dense_layer(kind: dict[str, Any]) -> None:
    model = trained()
    dense = adapted(dense_twin(aqlm_llama()), lora_config())
    share_adapter(model, dense)
    for twin in (model, dense):
        _add(twin, "other", **kind)
        twin.base_model.set_adapter(["default", "other"])
    share_adapter(model, dense)
    codes = [part.clone() for part in codes_of(model)]
    separate = logits(model)
    torch.testing.assert_close(separate, logits(dense))
    for twin in (model, dense):
        twin.merge_adapter()
    torch.testing.assert_close(logits(model), logits(dense))
    model.unmerge_adapter()
    assert all(torch.equal(one, other) for one, other in zip(codes_of(model), codes, strict=True))
    assert torch.equal(logits(model), separate)


def test_an_adapter_of_the_same_name_starts_afresh() -> None:
    model = aqlm_llama()
    before = logits(model)
    first: Any = peft.get_peft_model(model, lora_config(**PISSA))
    perturb(first)
    first.base_model.inject_adapter(first.base_model.model, "default")  # PiSSA again
    torch.testing.assert_close(logits(first), before)
    first.base_model.peft_config["default"] = lora_config()
    first.base_model.inject_adapter(first.base_model.model, "default")
    assert torch.equal(logits(first), before)


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning")  # here it does not
@each_kind
def test_saved_adapter_comes_back(kind: dict[str, Any], tmp_path: Path) -> None:
    model = trained(**kind)
    model.save_pretrained(tmp_path)
    names = set(peft.utils.load_peft_weights(str(tmp_path), device="cpu"))
    assert all("lora_" in name for name in names), "only the adapter itself is saved"
    loaded = PeftModel.from_pretrained(aqlm_llama(), str(tmp_path))
    torch.testing.assert_close(logits(loaded), logits(model))
    assert len(codes_of(loaded)) == 14
    loaded.load_adapter(str(tmp_path), "again")
    loaded.set_adapter("again")
    torch.testing.assert_close(logits(loaded), logits(model))


def test_loading_with_low_memory_keeps_the_codes(tmp_path: Path) -> None:
    model = trained(**DORA)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(aqlm_llama(), str(tmp_path), low_cpu_mem_usage=True)
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    assert torch.equal(logits(loaded), logits(model))


@each_kind
def test_copies_and_pickles(kind: dict[str, Any]) -> None:
    model = trained(**kind)
    before = logits(model)
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(duplicate), before)
        duplicate.merge_adapter()
        duplicate = copy.deepcopy(duplicate)
        duplicate.unmerge_adapter()
        assert torch.equal(logits(duplicate), before)


def test_layers_that_share_a_weight_merge_apart_and_share_it_again() -> None:
    model = aqlm_llama()
    first, second = (block.self_attn for block in model.model.layers)
    second.q_proj.weight = first.q_proj.weight
    model = peft.get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    perturb(model)
    before = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), before)
    model.unmerge_adapter()
    assert first.q_proj.base_layer.weight is second.q_proj.base_layer.weight


def test_failed_merge_changes_nothing() -> None:
    model = trained()
    with torch.no_grad():
        q_proj(model).lora_A["default"].weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert len(codes_of(model)) == 14


def test_cast_while_merged_is_kept() -> None:
    model = trained()
    codes = [part.clone() for part in codes_of(model)]
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    assert q_proj(model).base_layer.weight.dtype == torch.bfloat16
    assert all(torch.equal(one, other) for one, other in zip(codes_of(model), codes, strict=True))


def test_requantizing_merges_into_the_former_scheme() -> None:
    model = trained()
    merged = q_proj(copy.deepcopy(model).merge_and_unload()).weight
    inputs = []
    hook = q_proj(model).base_layer.register_forward_pre_hook(lambda module, given: inputs.append(given[0].detach()))
    logits(model)
    hook.remove()
    errors = {}
    for name, calibrate in {"data-free": None, "calibrated": lambda base: base(TOKENS)}.items():
        result = merge_and_requantize(copy.deepcopy(model), calibrate, solver=SolverConfig(max_rounds=6))
        weight = q_proj(result).weight
        assert isinstance(weight, AQLMTensor)
        assert str(weight.scheme) == "2x4g8"
        assert len(codes_of(result)) == 14
        errors[name] = float(
            (F.linear(inputs[0], merged - weight.dequantize())).norm() / F.linear(inputs[0], merged).norm()
        )
    assert errors["calibrated"] < errors["data-free"] < 0.8


def test_requantizing_needs_an_adapter_on_an_aqlm_layer() -> None:
    model = peft.get_peft_model(aqlm_llama(), peft.TrainableTokensConfig(token_indices=[1]))
    with pytest.raises(ValueError, match="no adapter was merged into an AQLM layer"):
        merge_and_requantize(model)
