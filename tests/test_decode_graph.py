"""DecodeGraph generates what the model's own `generate` does."""

from typing import Any

import pytest
import torch

from aqlm_tensor import decode_graph, fuse_
from aqlm_tensor.decode_graph import DecodeGraph
from tests.test_fusion import llama

PROMPT = torch.tensor([[5, 17, 3, 80, 41]])
OPTIONS = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps run as they are instead of being captured."""

    def capture(step, rewind):
        for _ in range(2):
            step()
            rewind()
        return step

    monkeypatch.setattr(decode_graph, "_require_cuda", lambda device: None)
    monkeypatch.setattr(decode_graph, "_capture", capture)


def model(device: str = "cpu") -> Any:
    torch.manual_seed(0)
    lm = llama().to(device)
    lm.generation_config.eos_token_id = None
    for layer in lm.model.layers.modules():
        if hasattr(layer, "weight") and hasattr(layer.weight, "codebooks"):
            layer.weight.codebooks.mul_(0.05)
    return lm


@pytest.mark.usefixtures("without_gpu")
def test_generates_the_same_tokens() -> None:
    lm = model()
    expected = lm.generate(PROMPT, **OPTIONS)
    decoder = DecodeGraph(lm, max_length=32, compile=False)
    assert torch.equal(decoder.generate(PROMPT, **OPTIONS), expected)
    other = PROMPT.flip(1)[:, :4]
    assert torch.equal(decoder.generate(other, **OPTIONS), lm.generate(other, **OPTIONS))
    assert torch.equal(decoder.generate(PROMPT, **OPTIONS), expected)
    assert "forward" not in vars(lm)


@pytest.mark.usefixtures("without_gpu")
def test_compiled_and_fused() -> None:
    torch.compiler.reset()
    lm = model()
    expected = lm.generate(PROMPT, **OPTIONS)
    fuse_(lm)
    decoder = DecodeGraph(lm, max_length=32)
    assert torch.equal(decoder.generate(PROMPT, **OPTIONS), expected)


@pytest.mark.usefixtures("without_gpu")
def test_what_it_cannot_do() -> None:
    decoder = DecodeGraph(model(), max_length=16, compile=False)
    with pytest.raises(ValueError, match="max_length=16"):
        decoder.generate(PROMPT, **OPTIONS)
    with pytest.raises(ValueError, match="batches of 1"):
        decoder.generate(PROMPT.repeat(2, 1), max_new_tokens=2)
    with pytest.raises(ValueError, match="padding"):
        decoder.generate(PROMPT, max_new_tokens=2, attention_mask=torch.tensor([[0, 1, 1, 1, 1]]))


def test_needs_a_gpu() -> None:
    with pytest.raises(ValueError, match="CUDA"):
        DecodeGraph(model(), max_length=16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@pytest.mark.parametrize("fused", [False, True])
def test_on_a_gpu(fused: bool) -> None:
    torch.compiler.reset()
    lm = model("cuda")
    prompt = PROMPT.cuda()
    expected = lm.generate(prompt, **OPTIONS)
    if fused:
        fuse_(lm)
    decoder = DecodeGraph(lm, max_length=32)
    for _ in range(2):
        assert torch.equal(decoder.generate(prompt, **OPTIONS), expected)
