"""Saving: models quantized in place, what other readers make of our checkpoints, and the config that describes them."""

import json
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torchao
import transformers
from safetensors.torch import load_file
from torch import nn
from torchao.quantization import FqnToConfig

import aqlm_tensor.integrations.hf
from aqlm_tensor import AQLMTensor, load, quantize_, save, trainable
from aqlm_tensor.checkpoint import inspect
from aqlm_tensor.linear import set_quantized
from tests.models import config
from tests.tensor.weights import random_weight

from .official import FAMILIES, logits_of, write_pair


def fresh(name: str = "llama") -> Any:
    torch.manual_seed(0)
    return FAMILIES[name].model(FAMILIES[name].config()).eval()


def section_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("name", ["llama", "qwen2", "mixtral", "llava", "bert"])
def test_a_model_quantized_in_place(name: str, tmp_path: Path) -> None:
    model = fresh(name)
    quantize_(model, config("2x4g8"))
    model.save_pretrained(tmp_path / "saved")
    loaded = FAMILIES[name].auto.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits_of(loaded), logits_of(model), rtol=1e-6, atol=1e-6)
    weights = [weight for weight in loaded.parameters() if isinstance(weight, AQLMTensor)]
    assert len(weights) == sum(isinstance(weight, AQLMTensor) for weight in model.parameters())
    assert loaded.config.quantization_config.to_dict() == model.config.quantization_config.to_dict()


def test_torchao_and_several_schemes(tmp_path: Path) -> None:
    model = fresh()
    table: Any = OrderedDict({r"re:.*attn.*_proj": config("1x4g8"), r"re:.*mlp.*_proj": config("2x4g16")})
    torchao.quantization.quantize_(model, FqnToConfig(table), filter_fn=None)
    model.save_pretrained(tmp_path / "saved")
    section = section_of(tmp_path / "saved")
    assert section["num_codebooks"] == 1
    assert section["linear_weights_not_to_quantize"] == ["lm_head", "lm_head.weight"]
    assert set(section["aqlm_tensor"]["schemes"].values()) == {"2x4g16"}
    loaded = FAMILIES["llama"].auto.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits_of(loaded), logits_of(model))


def test_quantizing_more_after_loading_is_saved(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, FAMILIES["llama"])
    model = FAMILIES["llama"].auto.from_pretrained(pair.aqlm)
    quantize_(model, config("1x4g8"), filter_fn=lambda _, fqn: fqn == "lm_head")
    model.save_pretrained(tmp_path / "saved")
    assert section_of(tmp_path / "saved")["aqlm_tensor"]["schemes"] == {"lm_head": "1x4g8"}
    loaded = FAMILIES["llama"].auto.from_pretrained(tmp_path / "saved")
    assert isinstance(loaded.lm_head.weight, AQLMTensor)
    torch.testing.assert_close(logits_of(loaded), logits_of(model))


def test_a_model_without_quantized_layers_any_more_is_dense(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, FAMILIES["llama"])
    model = FAMILIES["llama"].auto.from_pretrained(pair.aqlm)
    for module in model.modules():  # as merging adapters does
        if isinstance(module, nn.Linear) and isinstance(module.weight, AQLMTensor):
            module.weight = nn.Parameter(module.weight.dequantize(), requires_grad=False)
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    loaded = FAMILIES["llama"].auto.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_saved_while_it_is_trained(name: str, tmp_path: Path) -> None:
    model = fresh(name)
    quantize_(model, config("2x4g8"))
    with trainable(model):
        save(model, tmp_path / "ours")
        model.save_pretrained(tmp_path / "theirs")
    expected = logits_of(model)
    assert torch.equal(logits_of(load(fresh(name), tmp_path / "ours")), expected)
    assert torch.equal(logits_of(FAMILIES[name].auto.from_pretrained(tmp_path / "theirs")), expected)


def test_stacks_of_experts_that_are_stored_as_stacks(tmp_path: Path) -> None:
    """Granite's checkpoints hold `input_linear.weight`, which Transformers renames to `experts.gate_up_proj`."""
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 32}
    settings = transformers.GraniteMoeConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2
    )
    model: Any = transformers.GraniteMoeForCausalLM(settings).eval()
    quantize_(model, config("2x4g8"))
    for seed, layer in enumerate(model.model.layers):
        experts = layer.block_sparse_moe.experts
        for name in ("gate_up_proj", "down_proj"):
            weight = random_weight("1x4g8", *getattr(experts, name).shape[1:], experts=4, seed=seed)
            setattr(experts, name, nn.Parameter(weight, requires_grad=False))
    model.save_pretrained(tmp_path / "theirs")
    save(model, tmp_path / "ours")
    assert (
        "model.layers.1.block_sparse_moe.input_linear.weight"
        in section_of(tmp_path / "theirs")["aqlm_tensor"]["schemes"]
    )
    for folder in ("ours", "theirs"):
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert isinstance(loaded.model.layers[1].block_sparse_moe.experts.down_proj, AQLMTensor)
        assert torch.equal(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "llava"])
def test_both_writers_agree(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """`aqlm_tensor.save` writes what `save_pretrained` does, up to Transformers' renaming, and both are read back."""
    model = fresh(name).to(dtype)
    quantize_(model, config("2x4g8"))
    save(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (inspect(tmp_path / folder) for folder in ("ours", "theirs"))
    assert len(ours) == len(theirs)
    one, other = (FAMILIES[name].auto.from_pretrained(tmp_path / folder) for folder in ("ours", "theirs"))
    assert one.dtype == other.dtype == dtype
    assert torch.equal(logits_of(one), logits_of(other))
    if dtype == torch.float32:  # `.to` also casts the buffers of positions, which from_pretrained keeps in float32
        assert torch.equal(logits_of(one), logits_of(model))
    if name == "llama" and dtype == torch.float32:
        assert torch.equal(logits_of(load(fresh(), tmp_path / "theirs")), logits_of(model))


def test_layers_that_share_a_weight(tmp_path: Path) -> None:
    """Sharing that the model's class does not know of is written twice, since loading would not restore it."""
    model = fresh()
    model.model.layers[1].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
    quantize_(model, config("2x4g8"))
    assert model.model.layers[1].mlp.down_proj.weight is model.model.layers[0].mlp.down_proj.weight
    model.save_pretrained(tmp_path / "saved")
    loaded = FAMILIES["llama"].auto.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits_of(loaded), logits_of(model))


def test_attach(tmp_path: Path) -> None:
    model = fresh()
    assert not aqlm_tensor.integrations.hf.attach(model)
    quantize_(model, config("2x4g8"))
    expected = logits_of(model)
    assert aqlm_tensor.integrations.hf.attach(model)
    assert not aqlm_tensor.integrations.hf.attach(model)
    assert model.hf_quantizer.is_serializable()
    model.save_pretrained(tmp_path / "saved")
    model.dequantize()
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-5)
    assert not hasattr(model, "hf_quantizer") or model.hf_quantizer is None


def test_dense_models_are_saved_as_ever(tmp_path: Path) -> None:
    model = fresh()
    size = model.get_memory_footprint()
    assert size == sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    with pytest.raises(ValueError, match="need to first quantize"):
        model.dequantize()


def test_footprint_and_repr(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, FAMILIES["llama"])
    model = FAMILIES["llama"].auto.from_pretrained(pair.aqlm)
    stored = sum(tensor.nbytes for tensor in load_file(pair.aqlm / "model.safetensors").values())
    assert model.get_memory_footprint(return_buffers=False) == stored
    assert model.get_memory_footprint() == stored + sum(buffer.nbytes for buffer in model.buffers())
    line = "Linear(in_features=64, out_features=64, bias=False, weight=AQLMTensor(scheme=2x8g8, bits_per_weight="
    assert repr(model.model.layers[0].self_attn.q_proj).startswith(line)


# The official package, in plain Transformers ------------------------------------------------------------------------

READ_BY_PLAIN_TRANSFORMERS = """
import sys
import numba, torch
from transformers import AutoModelForCausalLM
numba.set_num_threads(1)  # the official CPU kernels race with more
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
from aqlm import QuantizedLinear
assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 14
assert not any(name.startswith("aqlm_tensor") for name in sys.modules)
with torch.no_grad():
    torch.save(model(torch.arange(3, 17).view(2, 7)).logits, sys.argv[2])
"""


@pytest.mark.parametrize("scheme", ["2x8g8", pytest.param("1x8g8", marks=pytest.mark.full)])
def test_plain_transformers_with_the_official_package_reads_ours(scheme: str, tmp_path: Path) -> None:
    pytest.importorskip("aqlm", reason="the witness aqlm==1.1.7 is not installed")
    model = fresh()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.lm_head:
            weight = random_weight(scheme, module.out_features, module.in_features)
            set_quantized([module], AQLMTensor(weight.codes, weight.codebooks, weight.scales * 0.05))
    model.save_pretrained(tmp_path / "saved")
    logits = tmp_path / "logits"
    subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", READ_BY_PLAIN_TRANSFORMERS, tmp_path / "saved", logits],
        check=True,
        timeout=300,
    )
    theirs = torch.load(logits)
    assert float((theirs - logits_of(model)).norm() / theirs.norm()) < 1e-5


@pytest.mark.full
def test_the_official_layer_reads_experts(tmp_path: Path) -> None:
    """Transformers 5 cannot load quantized experts at all; the official layer itself can read each of ours."""
    aqlm = pytest.importorskip("aqlm", reason="the witness aqlm==1.1.7 is not installed")
    import numba

    pair = write_pair(tmp_path, FAMILIES["mixtral"])
    model = FAMILIES["mixtral"].auto.from_pretrained(pair.aqlm)
    model.save_pretrained(tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    experts = model.model.layers[0].mlp.experts
    threads = numba.get_num_threads()
    numba.set_num_threads(1)
    for expert in range(4):
        gate, up = experts.gate_up_proj.dequantize()[expert].chunk(2)
        for name, dense in (("w1", gate), ("w3", up), ("w2", experts.down_proj.dequantize()[expert])):
            layer = aqlm.QuantizedLinear(dense.shape[1], dense.shape[0], 8, 1, 2, 8, bias=False)
            prefix = f"model.layers.0.block_sparse_moe.experts.{expert}.{name}."
            layer.load_state_dict({part: tensors[prefix + part] for part in ("codes", "codebooks", "scales")})
            x = torch.randn(3, dense.shape[1])
            torch.testing.assert_close(layer(x), x @ dense.mT, rtol=1e-4, atol=1e-5)
    numba.set_num_threads(threads)
