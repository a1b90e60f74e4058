"""Other ways to store a model's weights in few bits, through the libraries that define them.

Each function quantizes the linear layers of a Transformers model's blocks in place, to what those weights are after
decoding (speed is not asked here), and returns the stored bits per weight, counting what the format keeps per group:
a scale of 16 bits, and a zero point of as many bits as a weight (16 for HQQ). A library that is missing raises
ImportError.
"""

import copy
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from aqlm_tensor.blocks import find_blocks, in_blocks, linears_of

__all__ = ["FORMATS", "GROUP", "gptq", "hqq", "round_to_nearest"]

GROUP = 64  # inputs that share a scale; 128, a common choice, does not divide SmolLM2's 576


@torch.no_grad()
def round_to_nearest(model: Any, bits: int, _batches: list[torch.Tensor]) -> float:
    """torchao's IntxWeightOnlyConfig with zero points; needs no data."""
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup, quantize_

    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(GROUP), mapping_type=MappingType.ASYMMETRIC
    )
    quantize_(model, config, in_blocks(model))
    for layer in linears_of(find_blocks(model)):
        weight: Any = layer.weight
        layer.weight = torch.nn.Parameter(weight.dequantize(), requires_grad=False)
    return bits + (16 + bits) / GROUP


@torch.no_grad()
def hqq(model: Any, bits: int, _batches: list[torch.Tensor]) -> float:
    """HQQ (Badri and Shaji 2023) with the settings of its Transformers integration; needs no data."""
    from hqq.core.quantize import Quantizer  # pyright: ignore[reportMissingImports]

    for layer in linears_of(find_blocks(model)):
        dense = layer.weight
        codes, meta = Quantizer.quantize(
            dense.float(), nbits=bits, group_size=GROUP, axis=1, device=str(dense.device), compute_dtype=torch.float32
        )
        layer.weight = torch.nn.Parameter(Quantizer.dequantize(codes, meta).to(dense.dtype), requires_grad=False)
    return bits + 32 / GROUP


def gptq(model: Any, bits: int, batches: list[torch.Tensor]) -> float:
    """GPTQ (Frantar et al. 2022, arXiv 2210.17323) as GPTQModel does it by default, on the same calibration tokens."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its default of half the cores is too few on two
    from gptqmodel import GPTQModel, QuantizeConfig  # pyright: ignore[reportMissingImports]

    logging.getLogger("gptqmodel").setLevel(logging.ERROR)
    rows = [row for batch in batches for row in batch.tolist()]
    with tempfile.TemporaryDirectory() as folder:
        dense = copy.deepcopy(model).cpu()
        dense.save_pretrained(folder)
        _save_placeholder_tokenizer(Path(folder), model.config.vocab_size)
        # version 2 of the format keeps zero points as they are; version 1 is off by one until it is loaded again
        config = QuantizeConfig(bits=bits, group_size=GROUP, offload_to_disk=False, format="gptq_v2")
        loaded = GPTQModel.load(folder, config, device=str(model.device), dtype=torch.float32)
        loaded.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=1)
        found = dict(loaded.model.named_modules())
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and hasattr(found[name], "dequantize_weight"):
            weight = found[name].dequantize_weight().T.detach().to(layer.weight)
            layer.weight = torch.nn.Parameter(weight.contiguous(), requires_grad=False)
    return bits + (16 + bits) / GROUP


def _save_placeholder_tokenizer(folder: Path, vocabulary: int) -> None:
    """GPTQModel wants a tokenizer beside the model, though it is given tokens."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"token{index}": index for index in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="token0"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="token0", pad_token="token0", eos_token="token2"
    ).save_pretrained(folder)


FORMATS: dict[str, Callable[[Any, int, list[torch.Tensor]], float]] = {
    "rtn": round_to_nearest,
    "hqq": hqq,
    "gptq": gptq,
}
