"""Every PEFT method on AQLM layers computes and learns what it would on the dequantized weights, or says why not."""

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from aqlm_tensor import AQLMTensor
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

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # PEFT uses what Transformers deprecates
    pytest.mark.filterwarnings("ignore::UserWarning"),  # some methods advise on their hyper-parameters at this size
]

METHODS: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(target_modules=TARGETS),
    "rslora, all linear": lambda: peft.LoraConfig(target_modules="all-linear", use_rslora=True),
    "lora bias": lambda: peft.LoraConfig(target_modules=["q_proj"], lora_bias=True),
    "dora": lambda: peft.LoraConfig(target_modules=TARGETS, use_dora=True),
    "pissa": lambda: peft.LoraConfig(target_modules=TARGETS, init_lora_weights="pissa"),
    "olora": lambda: peft.LoraConfig(target_modules=TARGETS, init_lora_weights="olora"),
    "ia3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "loha": lambda: peft.LoHaConfig(target_modules=TARGETS),
    "lokr": lambda: peft.LoKrConfig(target_modules=TARGETS),
    "oft": lambda: peft.OFTConfig(target_modules=TARGETS, oft_block_size=16),
    "vera": lambda: peft.VeraConfig(target_modules=TARGETS, r=4),
}
MORE_METHODS: dict[str, Any] = {
    "orthogonal": lambda: peft.LoraConfig(target_modules=TARGETS, init_lora_weights="orthogonal"),
    "gaussian": lambda: peft.LoraConfig(target_modules=TARGETS, init_lora_weights="gaussian"),
    "mica": lambda: peft.LoraConfig(target_modules=TARGETS, init_lora_weights="mica"),
    "adalora": lambda: peft.AdaLoraConfig(target_modules=TARGETS, total_step=10),
    "boft": lambda: peft.BOFTConfig(target_modules=TARGETS, boft_block_size=4),
    "c3a": lambda: peft.C3AConfig(target_modules=TARGETS, block_size=8),
    "deft": lambda: peft.DeftConfig(target_modules=TARGETS),
    "delora": lambda: peft.DeloraConfig(target_modules=TARGETS),
    "fourierft": lambda: peft.FourierFTConfig(target_modules=TARGETS, n_frequency=20),
    "gralora": lambda: peft.GraloraConfig(target_modules=TARGETS),
    "hra": lambda: peft.HRAConfig(target_modules=TARGETS),
    "miss": lambda: peft.MissConfig(target_modules=TARGETS),
    "peanut": lambda: peft.PeanutConfig(target_modules=TARGETS),
    "psoft": lambda: peft.PsoftConfig(target_modules=TARGETS),
    "pvera": lambda: peft.PveraConfig(target_modules=TARGETS),
    "randlora": lambda: peft.RandLoraConfig(target_modules=TARGETS, r=8),
    "road": lambda: peft.RoadConfig(target_modules=TARGETS, group_size=16),
    "shira": lambda: peft.ShiraConfig(target_modules=TARGETS, r=4),
    "tinylora": lambda: peft.TinyLoraConfig(target_modules=TARGETS),
    "unilora": lambda: peft.UniLoraConfig(target_modules=TARGETS),
    "vblora": lambda: peft.VBLoRAConfig(target_modules=TARGETS, r=2, num_vectors=8, vector_length=16),
    "waveft": lambda: peft.WaveFTConfig(target_modules=TARGETS, n_frequency=20),
    "layer norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "tokens": lambda: peft.TrainableTokensConfig(token_indices=[1, 2]),
}
NEVER_MERGED: dict[str, Any] = {
    "beft": lambda: peft.BeftConfig(target_modules=TARGETS),
    "lily": lambda: peft.LilyConfig(target_modules=TARGETS),
    "lora with dropout": lambda: peft.LoraConfig(target_modules=TARGETS, lora_dropout=0.2),
    "dora with dropout": lambda: peft.LoraConfig(target_modules=TARGETS, lora_dropout=0.2, use_dora=True),
    "pissa with dropout": lambda: peft.LoraConfig(target_modules=TARGETS, lora_dropout=0.2, init_lora_weights="pissa"),
    "prompts": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


def _cases(methods: dict[str, Any], *marks: pytest.MarkDecorator) -> list[Any]:
    return [pytest.param(method, id=name, marks=marks) for name, method in methods.items()]


MERGING = [*_cases(METHODS), *_cases(MORE_METHODS, pytest.mark.full)]
TRAINING = [*MERGING, *_cases(NEVER_MERGED, pytest.mark.full)]


def _relative(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference.double()).norm() / (reference.double().norm() + 1e-12))


def _losses(models: list[Any]) -> list[Tensor]:
    losses = []
    for model in models:
        torch.manual_seed(5)  # of dropout
        losses.append(model.train()(TOKENS, labels=TOKENS).loss)
    return losses


@pytest.mark.parametrize("method", TRAINING)
def test_outputs_and_gradients_are_those_of_the_dense_twin(method: Any) -> None:
    model = aqlm_llama()
    ours, dense = adapted(model, method()), adapted(dense_twin(model), method())
    perturb(ours)
    share_adapter(ours, dense)
    own_tokens = logits(ours)[:, -TOKENS.shape[1] :]  # without virtual ones
    assert _relative(own_tokens, logits(model)) > 1e-4, "the adapter does nothing, so that this would show nothing"
    assert _relative(logits(ours), logits(dense)) < 1e-5
    for loss in _losses([ours, dense]):
        loss.backward()
    for (name, one), other in zip(ours.named_parameters(), dense.parameters(), strict=True):
        if one.requires_grad:
            assert (one.grad is None) == (other.grad is None), name
            assert one.grad is None or _relative(one.grad, other.grad) < 1e-4, name


@pytest.mark.parametrize("method", MERGING)
def test_merging_is_lossless_and_unmerging_exact(method: Any) -> None:
    model = adapted(aqlm_llama(), method())
    perturb(model)
    codes = [part.clone() for part in codes_of(model)]
    before = logits(model)
    model.merge_adapter()
    assert _relative(logits(model), before) < 1e-5
    model.unmerge_adapter()
    assert all(torch.equal(one, other) for one, other in zip(codes_of(model), codes, strict=True))
    assert torch.equal(logits(model), before)
    merged = model.merge_and_unload()
    assert _relative(logits(merged), before) < 1e-5
    assert not any("base_layer" in name for name, _ in merged.named_modules())


@pytest.mark.full
def test_only_shira_makes_a_layer_dense_in_the_forward_pass() -> None:
    ran_dense = set()
    for name, method in (METHODS | MORE_METHODS).items():
        model = adapted(aqlm_llama(), method())
        with registry.record() as ran:
            model.train()(TOKENS, labels=TOKENS).loss.backward()
        if any(op == "dequantize" for op, _ in ran):
            ran_dense.add(name)
    assert ran_dense == {"shira"}


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "hira": (peft.HiraConfig(target_modules=TARGETS), ValueError, "HIRA cannot be used .* multiplies the dense weight"),
    "glora": (peft.GloraConfig(target_modules=TARGETS), ValueError, "GLORA cannot be used .* Use LoRA"),
    "osf": (peft.OSFConfig(target_modules=TARGETS), ValueError, "OSF cannot be used .* singular vectors"),
    "supertuning": (peft.SupertuningConfig(target_modules=TARGETS), ValueError, "SUPERTUNING cannot be used"),
    "frod": (peft.FrodConfig(target_modules=TARGETS), NotImplementedError, "call `.dequantize\\(\\)` first"),
    "loftq": (
        peft.LoraConfig(target_modules=TARGETS, init_lora_weights="loftq", loftq_config=peft.LoftQConfig()),
        ValueError,
        "LoftQ cannot be used .* quantized already",
    ),
    "pissa and dora": (
        peft.LoraConfig(target_modules=TARGETS, init_lora_weights="pissa", use_dora=True),
        ValueError,
        "cannot be combined with DoraLinearVariant",
    ),
    "a parameter": (
        peft.LoraConfig(target_modules=[], target_parameters=["q_proj.weight"]),
        ValueError,
        "for an nn.Linear use target_modules",
    ),
    "training the weight itself": (
        peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["v_proj"]),
        RuntimeError,
        "cannot require a gradient.*aqlm_tensor.trainable",
    ),
}


@pytest.mark.parametrize(("peft_config", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_says_why_and_leaves_the_weights(peft_config: Any, error: Any, message: str) -> None:
    model = aqlm_llama()
    with pytest.raises(error, match=message):
        peft.get_peft_model(model, copy.deepcopy(peft_config))
    assert sum(isinstance(parameter, AQLMTensor) for parameter in model.parameters()) == 14
    assert isinstance(model.model.layers[0].mlp.down_proj.weight, AQLMTensor) or "modules_to_save" in str(peft_config)
