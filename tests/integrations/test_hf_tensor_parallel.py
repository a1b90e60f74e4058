"""Tensor parallelism on two ranks: a checkpoint loads in parts, computes as in one process, and saves byte-equal."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

import aqlm_tensor.integrations.hf  # noqa: F401 - registers
from aqlm_tensor import AQLMTensor
from tests import ranks

from .official import FAMILIES, logits_of, write_pair


def parallel(folder: Path, plan: Any = "auto") -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan=plan, tp_size=2))


def whole(folder: Path) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    return model.to(ranks.device())


def checkpoint(rank: int, folder: Path, family: str, scheme: str) -> Path:
    """One that both ranks read."""
    if rank == 0:
        write_pair(folder, FAMILIES[family], scheme)
    torch.distributed.barrier()
    return folder / "aqlm"


def check_family(rank: int, folder: Path, family: str, scheme: str = "2x4g8") -> None:
    source = checkpoint(rank, folder, family, scheme)
    model, alone = parallel(source), whole(source)
    up, down = model.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.down_proj.weight
    assert isinstance(up, AQLMTensor)
    assert isinstance(down, AQLMTensor)
    assert (up.shape, down.shape) == ((64, 64), (64, 64))
    assert torch.equal(up.dequantize(), alone.model.layers[0].mlp.up_proj.weight.dequantize().chunk(2)[rank])
    assert torch.equal(down.dequantize(), alone.model.layers[0].mlp.down_proj.weight.dequantize().chunk(2, 1)[rank])
    torch.testing.assert_close(logits_of(model), logits_of(alone), rtol=1e-4, atol=1e-5)
    tokens = torch.arange(3, 17).view(2, 7).to(ranks.device())
    assert torch.equal(model.generate(tokens, max_new_tokens=4), alone.generate(tokens, max_new_tokens=4))
    model.save_pretrained(folder / "saved")
    torch.distributed.barrier()
    saved, stored = (load_file(path / "model.safetensors") for path in (folder / "saved", source))
    if alone.config.tie_word_embeddings:
        assert torch.equal(saved.pop("lm_head.weight"), saved["model.embed_tokens.weight"])  # as Transformers has it
    else:
        assert (folder / "saved" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert saved.keys() == stored.keys()
    assert [name for name in stored if not torch.equal(saved[name], stored[name])] == []
    configs = [json.loads((path / "config.json").read_text()) for path in (folder / "saved", source)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def llama(rank: int, folder: Path) -> None:
    check_family(rank, folder, "llama")


def qwen2(rank: int, folder: Path) -> None:
    """With biases and tied embeddings."""
    check_family(rank, folder, "qwen2", "1x12g8")


def input_gradients(rank: int, folder: Path) -> None:
    source = checkpoint(rank, folder, "llama", "2x4g8")
    gradients = []
    for model in (parallel(source), whole(source)):
        embeddings = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0)).to(ranks.device())
        embeddings.requires_grad_()
        model(inputs_embeds=embeddings).logits.square().sum().backward()
        gradients.append(embeddings.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


def refusals(rank: int, folder: Path) -> None:
    wide = checkpoint(rank, folder, "llama", "2x4g64")
    with pytest.raises(ValueError, match=r"o_proj.*2 equal parts along dimension 1.*whole groups of 64.*replicate"):
        parallel(wide)
    (folder / "mixtral").mkdir(exist_ok=True)
    mixtral = checkpoint(rank, folder / "mixtral", "mixtral", "2x4g8")
    with pytest.raises(
        ValueError, match=r"experts.*only as colwise or rowwise.*'model.layers.\*.mlp.experts': 'replicate'"
    ):
        parallel(mixtral)


def experts_kept_whole(rank: int, folder: Path) -> None:
    """The remedy that the refusal names."""
    mixtral = checkpoint(rank, folder, "mixtral", "2x4g8")
    experts = "model.layers.*.mlp.experts"
    kept = dict.fromkeys((experts, f"{experts}.gate_up_proj", f"{experts}.down_proj"), "replicate")
    model, alone = parallel(mixtral, kept), whole(mixtral)
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (32, 64)
    assert model.model.layers[0].mlp.experts.down_proj.shape == (4, 64, 128)
    torch.testing.assert_close(logits_of(model), logits_of(alone), rtol=1e-4, atol=1e-5)


CASES = (llama, qwen2, input_gradients, refusals, experts_kept_whole)


outcomes, test_on_two_ranks = ranks.tests_of(CASES)
