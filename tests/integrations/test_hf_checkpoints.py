"""What may and may not be in an AQLM checkpoint that Transformers loads: nothing stays unfilled, nothing is dropped."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import aqlm_tensor.integrations.hf  # noqa: F401 - registers
from aqlm_tensor import AQLMTensor

from .official import FAMILIES, Pair, logits_of, write_pair


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair(tmp_path_factory.mktemp("llama"), FAMILIES["llama"], "2x4g8")


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair(tmp_path_factory.mktemp("mixtral"), FAMILIES["mixtral"], "2x4g8")


@pytest.fixture
def copy(llama: Pair, tmp_path: Path) -> Path:
    return shutil.copytree(llama.aqlm, tmp_path / "copy")


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    whole = json.loads((folder / "config.json").read_text())
    change(whole)
    (folder / "config.json").write_text(json.dumps(whole))


Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.update(surplus=torch.zeros(3)), "no place in LlamaForCausalLM: surplus"),
        (
            lambda tensors: tensors.update({f"model.layers.7.{name}": tensors[f"{Q}.{name}"].clone() for name in ()}
                                           | {f"model.layers.7.mlp.up_proj.{part}": tensors[f"{Q}.{part}"].clone()
                                              for part in ("codes", "codebooks", "scales")}),
            "3 tensors.*no place.*model.layers.7.mlp.up_proj.codebooks",
        ),
        (lambda tensors: tensors.pop("model.norm.weight"), "lacks 1 weights.*model.norm.weight"),
        (lambda tensors: tensors.pop("lm_head.weight"), "lacks 1 weights.*lm_head.weight"),
        (lambda tensors: tensors.pop(f"{Q}.scales"), f"{Q} has codes but lacks {Q}.scales"),
        (
            lambda tensors: [tensors.pop(f"{Q}.{part}") for part in ("codes", "codebooks", "scales")],
            f"lacks 1 weights.*{Q}.weight",
        ),
        (lambda tensors: tensors[f"{Q}.codes"].fill_(100), rf"{Q}.weight: codes out of range: found 100\.\.100"),
        (
            lambda tensors: tensors.update({f"{Q}.codes": tensors[f"{DOWN}.codes"].clone()}),
            rf"{Q} is \(64, 128\) in the checkpoint but \(64, 64\) in the model",
        ),
        (
            lambda tensors: tensors.update({f"{Q}.scales": torch.ones(3, 1, 1, 1)}),
            f"tensors of {Q} do not fit together",
        ),
    ],
)  # fmt: skip
def test_a_checkpoint_that_does_not_fit_raises(change: Callable, words: str, copy: Path) -> None:
    edit_tensors(copy, change)
    with pytest.raises(ValueError, match=words):
        AutoModelForCausalLM.from_pretrained(copy)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda section: section.update(num_codebooks=3), "are 2x4g8, but the checkpoint's config says 3x4g8"),
        (lambda section: section["linear_weights_not_to_quantize"].append(Q), f"{Q} is quantized in the checkpoint"),
        (
            lambda section: section["linear_weights_not_to_quantize"].append(f"{Q}.weight"),
            f"{Q} is quantized in the checkpoint",
        ),
        (lambda section: section.update(aqlm_tensor={"format_version": 2}), "format_version 2"),
        (lambda section: section.update(aqlm_tensor={"shemes": {}}), "unknown entries.*shemes"),
    ],
)
def test_a_config_that_contradicts_the_tensors_raises(change: Callable, words: str, copy: Path) -> None:
    edit_config(copy, lambda whole: change(whole["quantization_config"]))
    with pytest.raises(ValueError, match=words):
        AutoModelForCausalLM.from_pretrained(copy)


def test_experts_must_be_complete(mixtral: Pair, tmp_path: Path) -> None:
    expert = "model.layers.0.block_sparse_moe.experts.3.w1"
    folder = shutil.copytree(mixtral.aqlm, tmp_path / "copy")
    edit_tensors(folder, lambda tensors: [tensors.pop(f"{expert}.{part}") for part in ("codes", "codebooks", "scales")])
    with pytest.raises(ValueError, match=rf"lacks {expert}.c.* for .*experts.gate_up_proj"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_names_in_the_skip_list_are_those_of_the_checkpoint(mixtral: Pair, tmp_path: Path) -> None:
    """Transformers 5 calls the module `mlp`, the checkpoint and its skip list `block_sparse_moe`."""
    folder = shutil.copytree(mixtral.aqlm, tmp_path / "copy")
    skipped = json.loads((folder / "config.json").read_text())["quantization_config"]["linear_weights_not_to_quantize"]
    assert "model.layers.0.block_sparse_moe.gate.weight" in skipped
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    edit_config(folder, lambda whole: whole["quantization_config"]["linear_weights_not_to_quantize"].append(name))
    with pytest.raises(ValueError, match="experts.0.w1 is quantized in the checkpoint"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_layer_may_stay_dense(llama: Pair, copy: Path) -> None:
    dense = load_file(llama.dense / "model.safetensors")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for part in ("codes", "codebooks", "scales"):
            del tensors[f"{Q}.{part}"]
        tensors[f"{Q}.weight"] = dense[f"{Q}.weight"]

    edit_tensors(copy, change)
    edit_config(
        copy, lambda whole: whole["quantization_config"]["linear_weights_not_to_quantize"].append(f"{Q}.weight")
    )
    model = AutoModelForCausalLM.from_pretrained(copy)
    assert type(model.get_parameter(f"{Q}.weight")) is torch.nn.Parameter
    torch.testing.assert_close(
        logits_of(model), logits_of(AutoModelForCausalLM.from_pretrained(llama.dense)), rtol=1e-4, atol=1e-5
    )


def test_several_schemes(llama: Pair, copy: Path, tmp_path: Path) -> None:
    from tests.tensor.weights import random_weight

    other = random_weight("1x8g16", 64, 64)
    parts = zip(("codes", "codebooks", "scales"), other.parts(), strict=True)
    edit_tensors(copy, lambda tensors: tensors.update({f"{Q}.{name}": part for name, part in parts}))
    schemes = {"format_version": 1, "schemes": {Q: "1x8g16"}}
    edit_config(copy, lambda whole: whole["quantization_config"].update(aqlm_tensor=schemes))
    model = AutoModelForCausalLM.from_pretrained(copy)
    assert torch.equal(model.get_parameter(f"{Q}.weight").dequantize(), other.dequantize())  # pyright: ignore
    model.save_pretrained(tmp_path / "saved")
    section = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert section["aqlm_tensor"] == schemes


@pytest.mark.parametrize("shards", [1, 3])
def test_bin_files(llama: Pair, tmp_path: Path, shards: int) -> None:
    tensors = load_file(llama.aqlm / "model.safetensors")
    shutil.copy(llama.aqlm / "config.json", tmp_path)
    if shards == 1:
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        homes = {name: f"pytorch_model-{i % shards + 1:05d}-of-{shards:05d}.bin" for i, name in enumerate(tensors)}
        for file in set(homes.values()):
            torch.save({name: tensors[name] for name in tensors if homes[name] == file}, tmp_path / file)
        index = json.dumps({"metadata": {}, "weight_map": homes})
        (tmp_path / "pytorch_model.bin.index.json").write_text(index)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(model), logits_of(AutoModelForCausalLM.from_pretrained(llama.aqlm)))


def test_bin_files_run_no_code(llama: Pair, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "exploded",))

    shutil.copy(llama.aqlm / "config.json", tmp_path)
    torch.save({f"{Q}.codes": Bomb()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be read"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_sharded_safetensors(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, FAMILIES["mixtral"], "2x4g8", shards=3)
    assert len(list(pair.aqlm.glob("*.safetensors"))) == 3
    ours, theirs = (logits_of(AutoModelForCausalLM.from_pretrained(folder)) for folder in (pair.aqlm, pair.dense))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", ["auto", torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(stored: torch.dtype, dtype: Any, tmp_path: Path) -> None:
    """Codebooks and scales are cast to what is asked for; codes never."""
    pair = write_pair(tmp_path, FAMILIES["qwen2"], "1x12g8", stored)
    model = AutoModelForCausalLM.from_pretrained(pair.aqlm, dtype=dtype)
    wanted = stored if dtype == "auto" else dtype
    tensors = load_file(pair.aqlm / "model.safetensors")
    assert {parameter.dtype for parameter in model.parameters()} == {wanted}
    for name, weight in model.named_parameters():
        assert not (isinstance(weight, AQLMTensor) and weight.requires_grad)
        if isinstance(weight, AQLMTensor):
            layer = name.removesuffix(".weight")
            assert torch.equal(weight.codes, tensors[f"{layer}.codes"])
            assert weight.codes.dtype == torch.int16
            assert torch.equal(weight.codebooks, tensors[f"{layer}.codebooks"].to(wanted))
    dense = AutoModelForCausalLM.from_pretrained(pair.dense, dtype=wanted)
    bound = {torch.float32: 5e-6 if stored == wanted else 1e-3, torch.float16: 1e-2, torch.bfloat16: 6e-2}[wanted]
    ours, theirs = logits_of(model).double(), logits_of(dense).double()
    assert float((ours - theirs).norm() / theirs.norm()) < bound


def test_tied_embeddings(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, FAMILIES["qwen2"])
    assert "lm_head.weight" not in load_file(pair.aqlm / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(pair.aqlm)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_base_model_alone(llama: Pair) -> None:
    """An embedding model made of a language model: only the head has no place."""
    model, dense = (AutoModel.from_pretrained(folder) for folder in (llama.aqlm, llama.dense))
    tokens = torch.arange(3, 10)[None]
    assert isinstance(model.layers[0].mlp.up_proj.weight, AQLMTensor)
    torch.testing.assert_close(
        model(tokens).last_hidden_state, dense(tokens).last_hidden_state, rtol=1e-4, atol=1e-5
    )  # fmt: skip


def test_a_new_head_is_initialised_but_the_base_must_be_complete(copy: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(copy, num_labels=3)
    assert model.score.weight.requires_grad
    assert bool(model(torch.arange(3, 10)[None]).logits.isfinite().all())
    edit_tensors(copy, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"lacks 1 weights.*model\.norm\.weight"):
        AutoModelForSequenceClassification.from_pretrained(copy, num_labels=3)


def test_an_embedding_model_of_an_encoder(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, FAMILIES["bert"])
    tokens = torch.arange(3, 10)[None]
    ours, theirs = (AutoModel.from_pretrained(folder, add_pooling_layer=False)(tokens).last_hidden_state
                    for folder in (pair.aqlm, pair.dense))  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_state_dict_is_refused(llama: Pair) -> None:
    config = transformers.AutoConfig.from_pretrained(llama.aqlm)
    with pytest.raises(ValueError, match="pass a folder"):
        transformers.LlamaForCausalLM.from_pretrained(
            None, config=config, state_dict=load_file(llama.aqlm / "model.safetensors")
        )


def test_missing_and_old_packages_are_named() -> None:
    program = """
import importlib, importlib.metadata as metadata, sys
version = metadata.version
for package, found in (("transformers", "5.22.0"), ("transformers", None), ("accelerate", None)):
    def fake(name):
        if name != package:
            return version(name)
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found
    metadata.version = fake
    try:
        import aqlm_tensor.integrations.hf
    except ImportError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", program], capture_output=True, text=True, check=True, timeout=300
    )
    needs, remedy = "aqlm_tensor.integrations.hf needs", "pip install -U 'aqlm-tensor[transformers]'"
    assert done.stdout.splitlines() == [
        f"{needs} transformers >= 5.23, found 5.22.0: {remedy}",
        f"{needs} transformers >= 5.23, found none: {remedy}",
        f"{needs} accelerate >= 1.10, found none: {remedy}",
    ]


@pytest.mark.full
def test_the_integration_can_be_imported_without_peft() -> None:
    program = "import sys; sys.modules['peft'] = None; import aqlm_tensor.integrations.hf"
    subprocess.run([sys.executable, "-P", "-W", "ignore", "-c", program], check=True, timeout=300)
