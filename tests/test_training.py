"""trainable: gradients that equal those of the dense weight, shared parameters, and the tensor put back in place."""

from typing import Any

import pytest
import torch
from torch import nn

from aqlm_tensor import AQLMTensor, quantize_, trainable

from .models import TiedLM, config, mlp


def quantized() -> Any:
    model = mlp()
    quantize_(model, config())
    return model


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_codebooks_and_scales(compiled: bool) -> None:
    model = quantized()
    x = torch.randn(6, 64, requires_grad=True)
    weight = model[0].weight
    books, scales = weight.codebooks.clone().requires_grad_(), weight.scales.clone().requires_grad_()
    index = (weight.codes.long() & 15).unbind(-1)
    groups = sum(books[k][index[k]] for k in range(2))
    assert isinstance(groups, torch.Tensor)
    dense = (groups * scales).squeeze(2).reshape(128, 64)
    expected = torch.autograd.grad(
        torch.nn.functional.linear(x, dense, model[0].bias).square().sum(), [books, scales, x]
    )
    with trainable(model):
        layer = torch.compile(model[0], fullgraph=True) if compiled else model[0]
        layer(x).square().sum().backward()
        found = [model[0].codebooks.grad, model[0].scales.grad, x.grad]
    for gradient, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-4)


def test_training_lowers_the_loss_and_updates_the_tensor_in_place() -> None:
    model = quantized()
    weight, codes = model[0].weight, model[0].weight.codes.clone()
    x, y = torch.randn(32, 64), torch.randn(32, 64)
    before = (model(x) - y).square().mean()
    with trainable(model):
        assert all(parameter.requires_grad for parameter in model.parameters())
        names = {name for name, _ in model.named_parameters()}
        assert {"0.codebooks", "0.scales", "0.bias", "2.codebooks"} <= names
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(30):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
        inside = model(x)
    assert model[0].weight is weight
    assert type(model[0]) is nn.Linear
    assert torch.equal(weight.codes, codes)
    assert torch.equal(model(x), inside)
    assert (model(x) - y).square().mean() < 0.9 * before


def test_layers_that_share_a_weight_share_its_parameters() -> None:
    model = TiedLM()
    quantize_(model, config())
    with trainable(model):
        assert model.first.codebooks is model.second.codebooks
        assert sum(name.endswith("codebooks") for name, _ in model.named_parameters()) == 2
    assert model.first.weight is model.second.weight
    assert isinstance(model.first.weight, AQLMTensor)


def test_weight_is_readable_inside_and_restored_after_an_exception() -> None:
    model = quantized()
    dense = model[0].weight.dequantize()
    with pytest.raises(RuntimeError, match="stop"), trainable(model):
        assert torch.equal(model[0].weight.dequantize(), dense)
        raise RuntimeError("stop")
    assert type(model[0]) is nn.Linear
    assert torch.equal(model[0].weight.dequantize(), dense)


def test_cast_inside_the_block_stays() -> None:
    model = TiedLM()
    quantize_(model, config())
    with trainable(model):
        model.to(torch.bfloat16)
    assert isinstance(model.first.weight, AQLMTensor)
    assert model.first.weight is model.second.weight
    assert model.first.weight.dtype == model.first.weight.codebooks.dtype == torch.bfloat16
    model.eval()
    assert model(torch.arange(5)).dtype == torch.bfloat16


def test_autocast_casts_the_parts() -> None:
    model = quantized()
    x = torch.randn(3, 64)
    with trainable(model), torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
        y.float().square().sum().backward()
        assert model[0].codebooks.grad.dtype == torch.float32
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), model(x), rtol=0.05, atol=0.05)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="no AQLM layer"), trainable(mlp()):
        pass
    model = quantized()
    with pytest.raises(RuntimeError, match="trainable"):
        model[0].weight.requires_grad_(True)
    holder = nn.Module()
    holder.table = nn.Parameter(model[0].weight, requires_grad=False)
    with pytest.raises(ValueError, match="table is an AQLM weight"), trainable(holder):
        pass
