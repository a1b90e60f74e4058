"""Tiny models of several families on disk: AQLM checkpoints as the official converter writes them, and dense twins.

The converter keeps the names of the original checkpoint, wraps codes to signed, stores half precision, and lists every
tensor that it did not quantize: norms, embeddings and biases too, all with their full names.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from aqlm_tensor.scheme import AQLMScheme
from aqlm_tensor.tensor import AQLMTensor
from tests.strategies import random_parts

__all__ = ["DECODER", "FAMILIES", "Family", "Pair", "logits_of", "write_pair"]

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODER = {**SIZES, "num_key_value_heads": 2}
LAYERS = r"\.(layers|layer)\.\d+\."


@dataclass(frozen=True)
class Family:
    """A kind of model.

    Attributes:
        model: its class.
        config: makes a tiny config.
        auto: the class users load it with.
        linear: what the names of its linear weights have in common.
    """

    model: type
    config: Callable[[], Any]
    auto: Any = transformers.AutoModelForCausalLM
    linear: str = r"(_proj|\.w[123])\.weight$"

    @property
    def generates(self) -> bool:
        """Whether the model has `generate`."""
        return self.model.__name__ != "BertForMaskedLM"


def _llava() -> Any:
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = transformers.LlamaConfig(**DECODER)
    return transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=95, vision_feature_layer=-1
    )


FAMILIES = {
    "llama": Family(transformers.LlamaForCausalLM, lambda: transformers.LlamaConfig(**DECODER)),
    "mistral": Family(transformers.MistralForCausalLM, lambda: transformers.MistralConfig(**DECODER)),
    "qwen2": Family(
        transformers.Qwen2ForCausalLM, lambda: transformers.Qwen2Config(**DECODER, tie_word_embeddings=True)
    ),
    "qwen3": Family(transformers.Qwen3ForCausalLM, lambda: transformers.Qwen3Config(**DECODER, head_dim=16)),
    "gemma": Family(transformers.GemmaForCausalLM, lambda: transformers.GemmaConfig(**DECODER, head_dim=16)),
    "phi3": Family(transformers.Phi3ForCausalLM, lambda: transformers.Phi3Config(**DECODER)),
    "mixtral": Family(
        transformers.MixtralForCausalLM,
        lambda: transformers.MixtralConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2),
    ),
    "llava": Family(
        transformers.LlavaForConditionalGeneration, _llava, transformers.AutoModelForImageTextToText,
        r"(_proj|fc[12]|\.w[123])\.weight$",
    ),
    "bert": Family(
        transformers.BertForMaskedLM, lambda: transformers.BertConfig(**SIZES), transformers.AutoModelForMaskedLM,
        r"(query|key|value|dense)\.weight$",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """The same weights twice.

    Attributes:
        aqlm: folder of the quantized checkpoint.
        dense: folder with its weights dequantized.
        quantized: names of the quantized weights in the checkpoint.
    """

    aqlm: Path
    dense: Path
    quantized: tuple[str, ...]


def write_pair(
    folder: Path, family: Family, scheme: str = "2x8g8", dtype: torch.dtype = torch.float32, shards: int = 1
) -> Pair:
    """Write both checkpoints of a family."""
    torch.manual_seed(0)
    pair_of = folder / "dense", folder / "aqlm"
    model: Any = family.model(family.config()).to(dtype)
    for parameter in model.parameters():  # norms and biases at their initial 1 and 0 would hide a swap
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(pair_of[0])
    tensors = load_file(pair_of[0] / "model.safetensors")
    quantized = tuple(name for name in tensors if re.search(LAYERS, name) and re.search(family.linear, name))
    assert quantized
    official = {name: tensor for name, tensor in tensors.items() if name not in quantized}
    for seed, name in enumerate(quantized):
        codes, codebooks, scales = random_parts(scheme, *tensors[name].shape, dtype=dtype, seed=seed)
        scales = scales * 0.05
        tensors[name] = AQLMTensor(codes, codebooks, scales).dequantize()
        parts = {"codes": codes, "codebooks": codebooks, "scales": scales}
        official |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()}
    save_file(tensors, pair_of[0] / "model.safetensors", metadata={"format": "pt"})
    pair_of[1].mkdir()
    _write_shards(pair_of[1], official, shards)
    parsed = AQLMScheme.parse(scheme)
    whole = json.loads((pair_of[0] / "config.json").read_text())
    whole["quantization_config"] = {
        "quant_method": "aqlm",
        "nbits_per_codebook": parsed.nbits_per_codebook,
        "num_codebooks": parsed.num_codebooks,
        "out_group_size": parsed.out_group_size,
        "in_group_size": parsed.in_group_size,
        "linear_weights_not_to_quantize": sorted({*tensors, "lm_head.weight"} - set(quantized)),
    }
    whole["torch_dtype"] = whole.pop("dtype")
    (pair_of[1] / "config.json").write_text(json.dumps(whole))
    return Pair(pair_of[1], pair_of[0], quantized)


def _write_shards(folder: Path, tensors: dict[str, Tensor], shards: int) -> None:
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    homes = {name: f"model-{index % shards + 1:05d}-of-{shards:05d}.safetensors" for index, name in enumerate(names)}
    for file in set(homes.values()):
        shard = {name: tensors[name] for name in names if homes[name] == file}
        save_file(shard, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": homes}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def logits_of(model: Any, tokens: Tensor | None = None) -> Tensor:
    """Logits [2, 7, V] for fixed tokens, with an image where the model sees."""
    inputs: dict[str, Any] = {"input_ids": tokens if tokens is not None else torch.arange(3, 17).view(2, 7)}
    if model.config.model_type == "llava" and tokens is None:
        inputs["input_ids"][:, 1:5] = model.config.image_token_id
        inputs["pixel_values"] = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16).to(model.dtype)
    if model.device.type != "meta":  # it is offloaded, and its hooks move inputs
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
    with torch.no_grad():
        return model(**inputs).logits
