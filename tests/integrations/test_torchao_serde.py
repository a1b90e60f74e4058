"""TorchAoConfig(AQLMWeightConfig()) quantizes on the fly; saving gives an AQLM checkpoint or an error, never noise."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig
from torchao.quantization import quantize_ as torchao_quantize_
from transformers import AutoModelForCausalLM, TorchAoConfig

import aqlm_tensor.integrations.hf  # noqa: F401 - registers the refusal, too
from aqlm_tensor import AQLMTensor, load, save
from aqlm_tensor.integrations.torchao_serde import as_aqlm
from tests.models import config
from tests.tiny_llama import write_dense

TOKENS = torch.arange(10)[None]


@pytest.fixture
def on_the_fly(tmp_path: Path) -> Any:
    """A model that Transformers quantized through torchao while loading it."""
    folder = write_dense(tmp_path / "dense")
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=TorchAoConfig(config("2x4g8"))).eval()


def _aqlm_layers(model: Any) -> list[str]:
    return [name for name, parameter in model.named_parameters() if isinstance(parameter, AQLMTensor)]


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    return model(TOKENS).logits


def test_every_linear_layer_but_the_head_is_quantized(on_the_fly: Any) -> None:
    assert len(_aqlm_layers(on_the_fly)) == 14
    assert not any("lm_head" in name for name in _aqlm_layers(on_the_fly))
    assert torch.isfinite(_logits(on_the_fly)).all()


def test_saving_as_torchao_is_refused_with_the_remedy(on_the_fly: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"random after loading.*as_aqlm\(model\)\.save_pretrained"):
        on_the_fly.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("*.safetensors"))


def test_both_remedies_give_the_model_back(on_the_fly: Any, tmp_path: Path) -> None:
    before, layers = _logits(on_the_fly), _aqlm_layers(on_the_fly)
    save(on_the_fly, tmp_path / "ours")
    blank = type(on_the_fly)(on_the_fly.config).eval()
    assert torch.equal(_logits(load(blank, tmp_path / "ours")), before)
    assert not on_the_fly.hf_quantizer.is_trainable
    assert as_aqlm(on_the_fly) is on_the_fly
    assert on_the_fly.hf_quantizer.is_trainable  # or Trainer would refuse to train adapters
    assert torch.equal(_logits(on_the_fly), before)
    on_the_fly.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert _aqlm_layers(loaded) == layers
    assert torch.equal(_logits(loaded), before)


def test_a_scheme_per_layer_on_the_fly(tmp_path: Path) -> None:
    folder = write_dense(tmp_path / "dense")
    by_name = FqnToConfig(OrderedDict({r"re:.*q_proj": config("1x4g16"), r"re:.*mlp.*": config("2x4g8")}))
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=TorchAoConfig(by_name)).eval()
    assert len(_aqlm_layers(model)) == 8
    assert str(model.model.layers[0].self_attn.q_proj.weight.scheme) == "1x4g16"
    before = _logits(model)
    as_aqlm(model).save_pretrained(tmp_path / "saved")
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()), before)


def test_models_without_aqlm_weights_are_not_affected(tmp_path: Path) -> None:
    folder = write_dense(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
    with pytest.raises(ValueError, match="no AQLM weights|torchao"):
        as_aqlm(model)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), _logits(model))


def test_a_mixture_of_torchao_types_is_named(on_the_fly: Any) -> None:
    head = on_the_fly.lm_head
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    torchao_quantize_(head, Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match=r"lm_head.weight is a Int8Tensor of torchao \(1 such weights\)"):
        as_aqlm(on_the_fly)
