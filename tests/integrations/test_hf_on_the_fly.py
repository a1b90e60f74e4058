"""from_pretrained of a dense model that quantizes while it loads, one weight after the other."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from aqlm_tensor import AQLMTensor, AQLMWeightConfig, quantize_
from aqlm_tensor.checkpoint import inspect
from aqlm_tensor.integrations.hf import AqlmConfig
from aqlm_tensor.integrations.hf_on_the_fly import QuantizeWeight
from tests.models import QUICK, config

from .official import DECODER, FAMILIES, Pair, logits_of, write_pair

SOLVER = {"max_rounds": 1, "kmeans_iterations": 1}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair(tmp_path_factory.mktemp("llama"), FAMILIES["llama"])


def load(pair: Pair, quantization_config: Any, name: str = "llama", **options: Any) -> Any:
    return FAMILIES[name].auto.from_pretrained(pair.dense, quantization_config=quantization_config, **options)


def scheme_fields(scheme: str = "2x4g8") -> dict[str, Any]:
    return {"num_codebooks": int(scheme[0]), "nbits_per_codebook": int(scheme[2]), "in_group_size": int(scheme[4:])}


@pytest.mark.parametrize(
    "quantization_config",
    [
        config("2x4g8"),
        AqlmConfig(**scheme_fields(), aqlm_tensor={"solver": SOLVER}),
        {"quant_method": "aqlm", **scheme_fields(), "aqlm_tensor": {"solver": SOLVER}},
    ],
    ids=["AQLMWeightConfig", "AqlmConfig", "dict"],
)
def test_the_same_as_quantize_(llama: Pair, quantization_config: Any, tmp_path: Path) -> None:
    model = load(llama, quantization_config)
    expected = FAMILIES["llama"].auto.from_pretrained(llama.dense)
    quantize_(expected, config("2x4g8"))
    assert type(model.lm_head.weight) is nn.Parameter
    assert torch.equal(logits_of(model), logits_of(expected))
    model.save_pretrained(tmp_path / "saved")
    section = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert section["aqlm_tensor"] == {"format_version": 1, "schemes": {}}
    assert torch.equal(logits_of(FAMILIES["llama"].auto.from_pretrained(tmp_path / "saved")), logits_of(model))


def test_transformers_own_config(llama: Pair) -> None:
    model = load(llama, transformers.AqlmConfig(num_codebooks=1, nbits_per_codebook=4))
    assert str(model.model.layers[0].mlp.up_proj.weight.scheme) == "1x4g8"


def test_names_schemes_and_dense_layers(llama: Pair) -> None:
    up, down = (f"model.layers.0.mlp.{name}_proj" for name in ("up", "down"))
    options = {"schemes": {up: "1x4g16"}, "solver": SOLVER, "seed": 3}
    names = [f"{down}.weight"]
    model = load(llama, AqlmConfig(**scheme_fields(), linear_weights_not_to_quantize=names, aqlm_tensor=options))
    assert str(model.get_submodule(up).weight.scheme) == "1x4g16"
    assert type(model.get_submodule(down).weight) is nn.Parameter
    assert model.config.quantization_config.to_dict()["aqlm_tensor"]["schemes"] == {up: "1x4g16"}


def test_one_weight_at_a_time(llama: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a weight is quantized, all before it are codes already, and none after it has been read."""
    seen = []
    convert = QuantizeWeight.convert

    def watched(self: Any, input_dict: Any, **kwargs: Any) -> Any:
        weights = [module.weight for module in kwargs["model"].modules() if isinstance(module, nn.Linear)]
        seen.append([sum(isinstance(weight, AQLMTensor) for weight in weights),
                     sum(type(weight) is nn.Parameter and not weight.is_meta for weight in weights)])  # fmt: skip
        return convert(self, input_dict, **kwargs)

    monkeypatch.setattr(QuantizeWeight, "convert", watched)
    load(llama, config("2x4g8"))
    assert [quantized for quantized, _ in seen] == list(range(14))
    assert max(dense for _, dense in seen) <= 1  # lm_head


@pytest.mark.parametrize("name", ["qwen2", "bert", "mixtral"])
def test_families(name: str, tmp_path: Path) -> None:
    pair = write_pair(tmp_path, FAMILIES[name])
    model = load(pair, config("2x4g8"), name)
    expected = FAMILIES[name].auto.from_pretrained(pair.dense)
    head = expected.get_output_embeddings()
    linear = {
        layer for layer, module in expected.named_modules() if isinstance(module, nn.Linear) and module is not head
    }
    assert linear == {layer for layer, module in model.named_modules()
                      if isinstance(module, nn.Linear) and isinstance(module.weight, AQLMTensor)}  # fmt: skip
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(FAMILIES[name].auto.from_pretrained(tmp_path / "saved")), logits_of(model))


def test_experts(tmp_path: Path) -> None:
    """Gate and up of each expert get codebooks of their own, since the checkpoint keeps them apart."""
    pair = write_pair(tmp_path, FAMILIES["mixtral"])
    model = load(pair, config("2x4g8"), "mixtral")
    experts = model.model.layers[1].mlp.experts
    assert experts.gate_up_proj.codebooks.shape == (4, 2, 2, 16, 1, 8)
    dense = FAMILIES["mixtral"].auto.from_pretrained(pair.dense).model.layers[1].mlp.experts
    up = AQLMTensor.from_hp(dense.gate_up_proj[2, 128:].detach(), "2x4g8", solver=QUICK)
    assert torch.equal(experts.gate_up_proj[2].dequantize()[128:], up.dequantize())
    model.save_pretrained(tmp_path / "saved")
    names = {row.name for row in inspect(tmp_path / "saved") if row.scheme is not None}
    assert "model.layers.1.block_sparse_moe.experts.3.w3.weight" in names
    assert len(names) == len(pair.quantized)


TRANSPOSED = {
    "gpt_oss": lambda: transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2, head_dim=16)
    ),
    "llama4": lambda: transformers.Llama4ForCausalLM(
        transformers.Llama4TextConfig(
            **DECODER, num_local_experts=32, intermediate_size_mlp=128, head_dim=16, interleave_moe_layer_step=1
        )
    ),
}


@pytest.mark.parametrize("name", TRANSPOSED)
def test_experts_that_are_stored_transposed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are one tensor in the checkpoint, too: refused before anything is read, or left dense if that is wanted."""
    dense: Any = TRANSPOSED[name]()
    dense.save_pretrained(tmp_path / "dense")
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r'experts\.gate_up_proj.*"skip", to leave'):
        patch.setattr(QuantizeWeight, "convert", lambda *_, **__: pytest.fail("it began to load"))
        type(dense).from_pretrained(tmp_path / "dense", quantization_config=config("2x4g8"))
    skipping = config("2x4g8", on_incompatible="skip")
    model = type(dense).from_pretrained(tmp_path / "dense", quantization_config=skipping)
    experts = [parameter for parameter in model.parameters() if parameter.dim() == 3]
    assert experts
    assert not any(isinstance(parameter, AQLMTensor) for parameter in experts)
    assert isinstance(model.model.layers[0].self_attn.q_proj.weight, AQLMTensor)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(type(dense).from_pretrained(tmp_path / "saved")), logits_of(model))


def test_transposed_weights_are_not_saved_as_if_they_were_not(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, FAMILIES["llama"])
    model = FAMILIES["llama"].auto.from_pretrained(pair.aqlm)
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight = nn.Parameter(layer.weight.t(), requires_grad=False)
    with pytest.raises(ValueError, match=r"q_proj\.weight is a transposed view"):
        model.save_pretrained(tmp_path / "saved")


def test_what_is_refused(llama: Pair) -> None:
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj cannot be quantized to 1x16g8"):
        load(llama, AQLMWeightConfig("1x16g8", solver=QUICK))
    with pytest.raises(ValueError, match="no linear layer to quantize"):
        load(llama, AQLMWeightConfig("1x16g8", solver=QUICK, on_incompatible="skip"))
    with pytest.raises(ValueError, match="step='prepare' needs data"):
        load(llama, AQLMWeightConfig("2x4g8", step="prepare"))
    with pytest.raises(ValueError, match="pass `dtype=`"):
        load(llama, AQLMWeightConfig("2x4g8", codebook_dtype=torch.float16))
    with pytest.raises(ValueError, match="on_incompatible must be one of"):
        load(llama, AqlmConfig(aqlm_tensor={"on_incompatible": "ignore"}))


def test_a_weight_that_cannot_be_quantized_is_named(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, FAMILIES["llama"])
    model = FAMILIES["llama"].auto.from_pretrained(pair.dense)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(pair.dense)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: .*finite"):
        load(pair, config("2x4g8"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes(llama: Pair, dtype: torch.dtype) -> None:
    model = load(llama, config("2x4g8"), dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert bool(logits_of(model).isfinite().all())
