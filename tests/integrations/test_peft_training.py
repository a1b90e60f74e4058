"""Training LoRA on AQLM layers: gradients in every precision and mode, checkpointing, compilation, DoRA's norms."""

import copy
import inspect
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from aqlm_tensor.kernels import registry
from tests.integrations.peft_twins import (
    DORA,
    PISSA,
    PLAIN,
    TOKENS,
    adapted,
    aqlm_llama,
    codes_of,
    dense_twin,
    each_kind,
    gradients_of,
    logits,
    lora_config,
    perturb,
    q_proj,
    share_adapter,
    trained,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT uses what Transformers deprecates


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
    weight = q_proj(model).weight
    assert weight.dtype == weight.codebooks.dtype == weight.scales.dtype == torch.float32
    assert logits(model).dtype == torch.float32


@each_kind
def test_gradient_checkpointing_gives_the_same_gradients(kind: dict[str, Any]) -> None:
    model = adapted(aqlm_llama(), lora_config(**kind))
    perturb(model)
    expected = gradients_of(model)
    with registry.record() as once:
        gradients_of(model)
    peft.prepare_model_for_kbit_training(model.get_base_model(), gradient_checkpointing_kwargs={"use_reentrant": False})
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in name
    with registry.record() as twice:
        gradients = gradients_of(model)
    assert len(twice) > len(once), "no layer was computed again"
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other)


@each_kind
@pytest.mark.parametrize("dropout", [0.0, pytest.param(0.1, marks=pytest.mark.full)])
def test_bfloat16_is_as_close_to_float32_as_a_dense_layer_is(kind: dict[str, Any], dropout: float) -> None:
    half = trained(dtype=torch.bfloat16, **kind, lora_dropout=dropout)
    dense = adapted(dense_twin(aqlm_llama(torch.bfloat16)), lora_config(**kind, lora_dropout=dropout))
    share_adapter(half, dense)
    exact = adapted(dense_twin(aqlm_llama(torch.bfloat16)).float(), lora_config(**kind, lora_dropout=dropout))
    share_adapter(half, exact)
    gradients = []
    for model in (half, dense, exact):
        torch.manual_seed(6)
        gradients.append(torch.cat([gradient.flatten().double() for gradient in gradients_of(model)]))
    ours, theirs = ((gradient - gradients[2]).norm() / gradients[2].norm() for gradient in gradients[:2])
    assert ours < 1.5 * theirs + 1e-3


@each_kind
def test_autocast(kind: dict[str, Any]) -> None:
    model = trained(**kind)
    expected = gradients_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        gradients = gradients_of(model)
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
    model = trained(**kind)
    expected = gradients_of(model)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model.get_base_model(), fullgraph=True, backend=backend)
    model.zero_grad()
    compiled(TOKENS, labels=TOKENS).loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    for gradient, other in zip(gradients, expected, strict=True):
        assert (gradient - other).norm() < 1e-4 * other.norm()


@each_kind
def test_training_lowers_the_loss_and_touches_no_code(kind: dict[str, Any]) -> None:
    model = adapted(aqlm_llama(), lora_config(**kind))
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
    model = trained(**DORA)
    logits(model)
    with torch.no_grad():
        q_proj(model).base_layer.weight.codebooks.mul_(1.5)
    dense = copy.deepcopy(model)
    layer = q_proj(dense)
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.dequantize(), requires_grad=False)
    torch.testing.assert_close(logits(model), logits(dense))


def test_dora_needs_no_dense_weight() -> None:
    model = trained(**DORA)
    with registry.record() as ran:
        gradients_of(model)
    assert "dequantize" not in {op for op, _ in ran}
