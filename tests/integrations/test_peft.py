"""LoRA on AQLM layers through a model's life: several adapters, merging, saving, precision, compilation, training."""

import copy
import inspect
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from torch.nn import functional as F

from aqlm_tensor import AQLMTensor, SolverConfig
from aqlm_tensor.integrations.peft_lora import merge_and_requantize, register
from aqlm_tensor.kernels import registry
from tests.integrations.peft_twins import (
    TARGETS,
    TOKENS,
    adapted,
    aqlm_llama,
    codes_of,
    dense_twin,
    logits,
    perturb,
    share_adapter,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT uses what Transformers deprecates

PLAIN: dict[str, Any] = {}
DORA: dict[str, Any] = {"use_dora": True}
PISSA: dict[str, Any] = {"init_lora_weights": "pissa"}
each_kind = pytest.mark.parametrize("kind", [PLAIN, DORA, PISSA], ids=["lora", "dora", "pissa"])


def _lora(**options: Any) -> LoraConfig:
    return LoraConfig(target_modules=TARGETS, **options)


def _trained(seed: int = 3, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A small AQLM model with a LoRA adapter that does something."""
    model = adapted(aqlm_llama(dtype), _lora(**options))
    perturb(model, seed=seed)
    return model


def _q_proj(model: Any) -> Any:
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return base.model.layers[0].self_attn.q_proj


def _gradients(model: Any) -> list[torch.Tensor]:
    model.zero_grad()
    model.train()(TOKENS, labels=TOKENS).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


def _add(model: Any, name: str, **options: Any) -> None:
    model.add_adapter(name, _lora(**options))
    model.set_adapter(name)
    perturb(model, seed=4)


def test_merged_layer_is_the_dequantized_weight_plus_the_product() -> None:
    model = _trained()
    layer = _q_proj(model)
    weight = layer.base_layer.weight.dequantize().double()
    product = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    expected = weight + layer.scaling["default"] * product
    merged = _q_proj(model.merge_and_unload())
    assert type(merged) is nn.Linear
    assert type(merged.weight) is nn.Parameter
    assert (merged.weight.double() - expected).abs().max() <= 2**-23 * expected.abs().max()


def test_bias_of_the_adapter_is_merged_and_restored_exactly() -> None:
    model = adapted(aqlm_llama(), LoraConfig(target_modules=["q_proj"], lora_bias=True))
    perturb(model, size=0.3)
    bias = _q_proj(model).base_layer.bias.clone()
    model.merge_adapter()
    assert not torch.equal(_q_proj(model).base_layer.bias, bias)
    model.unmerge_adapter()
    assert torch.equal(_q_proj(model).base_layer.bias, bias)


@each_kind
def test_several_adapters_switch_mix_and_go(kind: dict[str, Any]) -> None:
    model = _trained()
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
    assert not getattr(_q_proj(model), "aqlm_initial", None)


@each_kind
def test_two_adapters_merge_as_into_a_dense_layer(kind: dict[str, Any]) -> None:
    model = _trained()
    dense = adapted(dense_twin(aqlm_llama()), _lora())
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
    first: Any = peft.get_peft_model(model, _lora(**PISSA))
    perturb(first)
    first.base_model.inject_adapter(first.base_model.model, "default")  # PiSSA again
    torch.testing.assert_close(logits(first), before)
    first.base_model.peft_config["default"] = _lora()
    first.base_model.inject_adapter(first.base_model.model, "default")
    assert torch.equal(logits(first), before)


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning")  # here it does not
@each_kind
def test_saved_adapter_comes_back(kind: dict[str, Any], tmp_path: Path) -> None:
    model = _trained(**kind)
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
    model = _trained(**DORA)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(aqlm_llama(), str(tmp_path), low_cpu_mem_usage=True)
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    assert torch.equal(logits(loaded), logits(model))


@each_kind
def test_copies_and_pickles(kind: dict[str, Any]) -> None:
    model = _trained(**kind)
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
    model = _trained()
    with torch.no_grad():
        _q_proj(model).lora_A["default"].weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert len(codes_of(model)) == 14


def test_cast_while_merged_is_kept() -> None:
    model = _trained()
    codes = [part.clone() for part in codes_of(model)]
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    assert _q_proj(model).base_layer.weight.dtype == torch.bfloat16
    assert all(torch.equal(one, other) for one, other in zip(codes_of(model), codes, strict=True))


def test_requantizing_merges_into_the_former_scheme() -> None:
    model = _trained()
    merged = _q_proj(copy.deepcopy(model).merge_and_unload()).weight
    inputs = []
    hook = _q_proj(model).base_layer.register_forward_pre_hook(lambda module, given: inputs.append(given[0].detach()))
    logits(model)
    hook.remove()
    errors = {}
    for name, calibrate in {"data-free": None, "calibrated": lambda base: base(TOKENS)}.items():
        result = merge_and_requantize(copy.deepcopy(model), calibrate, solver=SolverConfig(max_rounds=3))
        weight = _q_proj(result).weight
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


def test_prepared_for_training_as_quantized_even_without_a_quantizer() -> None:
    model = aqlm_llama(torch.bfloat16)
    assert peft.prepare_model_for_kbit_training(model) is model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.is_gradient_checkpointing
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not hasattr(model, "quantization_method")


def test_peft_alone_prepares_by_upcasting_consistently() -> None:
    prepare = inspect.unwrap(peft.prepare_model_for_kbit_training)  # what was imported before the integration
    model = prepare(aqlm_llama(torch.bfloat16))
    weight = _q_proj(model).weight
    assert weight.dtype == weight.codebooks.dtype == weight.scales.dtype == torch.float32
    assert logits(model).dtype == torch.float32


@each_kind
def test_gradient_checkpointing_gives_the_same_gradients(kind: dict[str, Any]) -> None:
    model = adapted(aqlm_llama(), _lora(**kind))
    perturb(model)
    expected = _gradients(model)
    with registry.record() as once:
        _gradients(model)
    peft.prepare_model_for_kbit_training(model.get_base_model(), gradient_checkpointing_kwargs={"use_reentrant": False})
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in name
    with registry.record() as twice:
        gradients = _gradients(model)
    assert len(twice) > len(once), "no layer was computed again"
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other)


@each_kind
@pytest.mark.parametrize("dropout", [0.0, pytest.param(0.1, marks=pytest.mark.full)])
def test_bfloat16_is_as_close_to_float32_as_a_dense_layer_is(kind: dict[str, Any], dropout: float) -> None:
    half = _trained(dtype=torch.bfloat16, **kind, lora_dropout=dropout)
    dense = adapted(dense_twin(aqlm_llama(torch.bfloat16)), _lora(**kind, lora_dropout=dropout))
    share_adapter(half, dense)
    exact = adapted(dense_twin(aqlm_llama(torch.bfloat16)).float(), _lora(**kind, lora_dropout=dropout))
    share_adapter(half, exact)
    gradients = []
    for model in (half, dense, exact):
        torch.manual_seed(6)
        gradients.append(torch.cat([gradient.flatten().double() for gradient in _gradients(model)]))
    ours, theirs = ((gradient - gradients[2]).norm() / gradients[2].norm() for gradient in gradients[:2])
    assert ours < 1.5 * theirs + 1e-3


@each_kind
def test_autocast(kind: dict[str, Any]) -> None:
    model = _trained(**kind)
    expected = _gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        gradients = _gradients(model)
    difference, norm = (
        torch.cat([gradient.flatten() for gradient in values]).norm()
        for values in ([one - other for one, other in zip(gradients, expected, strict=True)], expected)
    )
    assert difference < 0.05 * norm


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        (PLAIN, "aot_eager"),
        *(pytest.param(kind, "inductor", marks=pytest.mark.full) for kind in (PLAIN, DORA, PISSA)),
    ],
)
def test_a_training_step_compiles_to_one_graph(
    kind: dict[str, Any], backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = _trained(**kind)
    expected = _gradients(model)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model.get_base_model(), fullgraph=True, backend=backend)
    model.zero_grad()
    compiled(TOKENS, labels=TOKENS).loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    for gradient, other in zip(gradients, expected, strict=True):
        assert (gradient - other).norm() < 1e-4 * other.norm()


@each_kind
def test_training_lowers_the_loss_and_touches_no_code(kind: dict[str, Any]) -> None:
    model = adapted(aqlm_llama(), _lora(**kind))
    codes = [part.clone() for part in codes_of(model)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(15):
        loss = model.train()(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.15
    assert all(torch.equal(one, other) for one, other in zip(codes_of(model), codes, strict=True))


def test_dora_notices_that_the_weight_changed() -> None:
    model = _trained(**DORA)
    logits(model)
    with torch.no_grad():
        _q_proj(model).base_layer.weight.codebooks.mul_(1.5)
    dense = copy.deepcopy(model)
    layer = _q_proj(dense)
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.dequantize(), requires_grad=False)
    torch.testing.assert_close(logits(model), logits(dense))


def test_dora_needs_no_dense_weight() -> None:
    model = _trained(**DORA)
    with registry.record() as ran:
        _gradients(model)
    assert "dequantize" not in {op for op, _ in ran}


def test_layers_say_what_they_are() -> None:
    model = _trained()
    assert peft.get_model_status(model).quantization_backend == "aqlm"
    assert "scheme=2x4g8" in repr(_q_proj(model))


def test_adapters_of_transformers_itself() -> None:
    model = aqlm_llama()
    model.add_adapter(_lora())
    assert type(_q_proj(model)).__name__ == "AQLMLinear"


def test_registering_twice_changes_nothing() -> None:
    inject = BaseTuner.inject_adapter
    register()
    assert BaseTuner.inject_adapter is inject


def test_dense_models_are_not_affected() -> None:
    model = adapted(dense_twin(aqlm_llama()), _lora(**PISSA))
    assert type(_q_proj(model)) is peft.tuners.lora.Linear
    assert not hasattr(_q_proj(model), "aqlm_initial")


ALONE = """
import torch
from peft import LoraConfig, VeraConfig, get_peft_model
from torch import nn
from aqlm_tensor import AQLMWeightConfig, SolverConfig, quantize_
{integration}
for config, merge in (
    (LoraConfig(target_modules=["0"]), True),
    (LoraConfig(target_modules=["0"], use_dora=True), False),
    (LoraConfig(target_modules=["0"], init_lora_weights="pissa"), False),
    (VeraConfig(target_modules=["0"], r=2), False),
):
    model = nn.Sequential(nn.Linear(64, 128))
    quantize_(model, AQLMWeightConfig("2x4g8", solver=SolverConfig(max_rounds=1, kmeans_iterations=1)))
    try:
        adapted = get_peft_model(model, config)
        adapted.merge_adapter() if merge else None
        print("works")
    except (ValueError, NotImplementedError) as error:
        print(type(error).__name__)
"""


@pytest.mark.full
@pytest.mark.parametrize(
    ("integration", "expected"),
    [
        ("", ["ValueError", "NotImplementedError", "NotImplementedError", "ValueError"]),
        ("import aqlm_tensor.integrations.hf", ["works"] * 4),
    ],
    ids=["PEFT alone", "with the integration"],
)
def test_what_the_integration_is_for(integration: str, expected: list[str]) -> None:
    program = ALONE.format(integration=integration)
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", program], capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout.split() == expected
