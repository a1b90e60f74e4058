"""fuse_: the same results from fewer products, and a model that looks as before."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from aqlm_tensor import AQLMTensor, fuse_, load, save, trainable, unfuse_
from aqlm_tensor.fusion import FusedGroup
from aqlm_tensor.kernels import registry
from aqlm_tensor.linear import set_quantized
from tests.conformance import assert_same_bits
from tests.strategies import random_parts


class Attention(nn.Module):
    """q, k and v of one input; k and v have half of q's rows."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.q_proj = nn.Linear(256, 64, bias=bias)
        self.k_proj = nn.Linear(256, 32, bias=False)
        self.v_proj = nn.Linear(256, 32, bias=bias)
        self.o_proj = nn.Linear(32, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q_proj(x)[..., :32] * self.k_proj(x)
        return self.o_proj(scores * self.v_proj(x))


def quantized(model: nn.Module, scheme: str = "2x2g8", dtype: torch.dtype = torch.float32) -> Any:
    """The model with a random weight in every linear layer."""
    for seed, layer in enumerate(module for module in model.modules() if isinstance(module, nn.Linear)):
        parts = random_parts(scheme, *layer.weight.shape, dtype=dtype, seed=seed)
        set_quantized([layer], AQLMTensor(*parts))
    return model.to(dtype).requires_grad_(False).eval()


def llama(**options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=97, num_hidden_layers=2, **sizes, **options))
    quantized(model.model.layers, "2x1g8")
    return model.eval().requires_grad_(False)


def dense(model: nn.Module) -> dict[str, Tensor]:
    """Everything in a state dict, readable."""
    return {
        name: value.dequantize() if isinstance(value, AQLMTensor) else value.clone()
        for name, value in model.state_dict().items()
    }


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_same_output_in_fewer_products(bias: bool, dtype: torch.dtype) -> None:
    model = quantized(Attention(bias), dtype=dtype)
    x = torch.randn(2, 3, 256, dtype=dtype)
    expected, before = model(x), dense(model)
    report = fuse_(model)
    assert report.fused == [("q_proj", "k_proj", "v_proj")]
    assert not report.skipped
    with registry.record() as ran:
        assert_same_bits(model(x), expected)
    assert len(ran) == 2
    assert equal(dense(model), before)
    assert isinstance(model.q_proj, nn.Linear)
    assert model.fused_q_proj_k_proj_v_proj.pending.x is None


def test_the_weights_are_views_of_the_fused_one() -> None:
    model = quantized(Attention())
    fuse_(model)
    group = model.fused_q_proj_k_proj_v_proj
    for layer in group.layers:
        for own, whole in zip(layer.weight.parts(), (group.codes, group.codebooks, group.scales), strict=True):
            assert own.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def test_undone_and_done_again() -> None:
    model = quantized(Attention())
    before, names = dense(model), [name for name, _ in model.named_modules()]
    first = fuse_(model)
    group = model.fused_q_proj_k_proj_v_proj
    assert fuse_(model) == first
    assert model.fused_q_proj_k_proj_v_proj is group
    assert unfuse_(model) is model
    assert [name for name, _ in model.named_modules()] == names
    assert type(model.q_proj) is nn.Linear
    assert equal(dense(model), before)
    weight: Any = model.q_proj.weight
    assert weight.codes.is_contiguous()


@pytest.mark.parametrize("order", [("q_proj", "k_proj", "v_proj"), ("v_proj", "q_proj", "k_proj"), ("k_proj",) * 3])
def test_any_order_and_any_input(order: tuple[str, ...]) -> None:
    """Whichever sibling is asked first, twice, or with another input, gives its own product."""
    model = quantized(Attention())
    one, other = torch.randn(2, 256), torch.randn(2, 256)
    calls = [*((name, one) for name in order), *zip(order, (one, other, one), strict=True)]
    expected = [getattr(model, name)(x) for name, x in calls]
    fuse_(model)
    for (name, x), y in zip(calls, expected, strict=True):
        assert_same_bits(getattr(model, name)(x), y)


def test_an_input_changed_in_place_is_another_input() -> None:
    model = quantized(Attention())
    x = torch.randn(2, 256)
    expected = model.k_proj(2 * x)
    fuse_(model)
    model.q_proj(x)
    x.mul_(2)
    assert_same_bits(model.k_proj(x), expected)


def test_replaced_loaded_and_moved_weights_count() -> None:
    model, other = quantized(Attention()), quantized(Attention())
    set_quantized([other.q_proj], AQLMTensor(*random_parts("2x2g8", 64, 256, seed=9)))
    fuse_(model)
    x = torch.randn(3, 256)
    model.load_state_dict(other.state_dict())
    assert model.fused_q_proj_k_proj_v_proj.tied
    assert_same_bits(model(x), other(x))  # q's codebooks, which are repeated in memory, too
    set_quantized([model.v_proj], AQLMTensor(*random_parts("2x2g8", 32, 256, seed=8)))
    set_quantized([other.v_proj], AQLMTensor(*random_parts("2x2g8", 32, 256, seed=8)))
    assert_same_bits(model(x), other(x))
    fuse_(model)
    model.bfloat16()
    assert model.fused_q_proj_k_proj_v_proj.tied
    assert_same_bits(model(x.bfloat16()), other.bfloat16()(x.bfloat16()))


OTHER = AQLMTensor(*random_parts("2x2g8", 64, 256, seed=9))

# whatever changes q's weight behind the back of nn.Module
CHANGES: dict[str, Any] = {
    "copy_": lambda model: model.q_proj.weight.copy_(OTHER),
    "data": lambda model: setattr(model.q_proj.weight, "data", OTHER),
    "_parameters": lambda model: model.q_proj._parameters.update(weight=nn.Parameter(OTHER, requires_grad=False)),
    "codebooks alone": lambda model: model.q_proj.weight.codebooks.copy_(OTHER.codebooks),
    "multiplied": lambda model: model.q_proj.weight.mul_(0.5),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_weights_count(name: str) -> None:
    model, x = quantized(Attention()), torch.randn(3, 256)
    fuse_(model)
    before = model.q_proj(x), model.k_proj(x), model.v_proj(x)
    CHANGES[name](model)
    alone = nn.functional.linear(x, model.q_proj.weight.dequantize())
    assert not torch.allclose(alone, before[0], rtol=1e-3)
    torch.testing.assert_close(model.q_proj(x), alone, rtol=1e-4, atol=1e-1)
    assert_same_bits(model.k_proj(x), before[1])


@pytest.mark.parametrize("compiled", [False, True])
def test_functional_call_with_another_weight(compiled: bool) -> None:
    model, x = quantized(Attention()), torch.randn(3, 256)

    def call(x: Tensor) -> Tensor:
        return torch.func.functional_call(model, {"q_proj.weight": OTHER}, (x,))

    expected, own = call(x), model(x)
    fuse_(model)
    model(x)
    torch.testing.assert_close((torch.compile(call, backend="aot_eager") if compiled else call)(x), expected)
    torch.testing.assert_close(model(x), own)
    gradients = torch.func.vmap(torch.func.grad(lambda x: model(x).square().sum()))(x)
    x.requires_grad_()
    model(x).square().sum().backward()
    torch.testing.assert_close(gradients, x.grad, rtol=1e-4, atol=1e-4 * float(gradients.abs().max()))


def test_copies_are_independent() -> None:
    model = quantized(Attention())
    fuse_(model)
    x = torch.randn(3, 256)
    expected = model(x)
    twin = copy.deepcopy(model)
    assert_same_bits(twin(x), expected)
    model.k_proj.weight.codebooks.zero_()
    assert_same_bits(twin(x), expected)
    fuse_(twin)
    assert twin.fused_q_proj_k_proj_v_proj.tied
    assert_same_bits(twin(x), expected)


def test_gradients() -> None:
    model = quantized(Attention(bias=True))
    grads = []
    for fused in (False, True):
        if fused:
            fuse_(model)
        model.q_proj.bias.requires_grad_(True)
        model.q_proj.bias.grad = None
        x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0), requires_grad=True)
        model(x).square().sum().backward()
        grads.append((x.grad, model.q_proj.bias.grad))
    for apart, together in zip(*grads, strict=True):
        torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4 * float(apart.abs().max()))


def test_saved_as_ever(tmp_path: Path) -> None:
    model = quantized(Attention())
    before = dense(model)
    fuse_(model)
    save(model, tmp_path / "saved")
    assert equal(dense(load(Attention(), tmp_path / "saved")), before)


def test_what_cannot_be_fused_says_why() -> None:
    with pytest.raises(ValueError, match="no module has two linear layers named together"):
        fuse_(nn.Sequential(nn.Linear(8, 8)))
    with pytest.raises(ValueError, match="q_proj has no AQLM weight"):
        fuse_(Attention())
    model = quantized(Attention())
    set_quantized([model.q_proj], AQLMTensor(*random_parts("1x4g8", 64, 256)))
    report = fuse_(model)
    assert report.fused == [("k_proj", "v_proj")]
    assert "differ" in report.skipped["q_proj/k_proj/v_proj"]
    with pytest.raises(ValueError, match="FusedLinear"), trainable(model):
        pass


def test_large_codebooks_are_not_repeated() -> None:
    model = quantized(Attention(), "2x8g8")
    report = fuse_(model)
    assert report.fused == [("k_proj", "v_proj")]
    assert "memory" in report.skipped["q_proj/k_proj/v_proj"]
    assert model.fused_k_proj_v_proj.codebooks.shape[0] == 2


def test_a_language_model() -> None:
    model = llama()
    tokens = torch.arange(10)[None]
    expected = model(tokens).logits
    assert len(fuse_(model).fused) == 4
    with registry.record() as ran:
        assert_same_bits(model(tokens).logits, expected)
    assert len(ran) == 2 * 4


@pytest.mark.parametrize("fused", [False, True])
def test_compiled_once_for_every_batch(fused: bool) -> None:
    """One graph for all batch sizes, also where a batch is as large as the number of codebooks."""
    torch.compiler.reset()
    model = llama(attn_implementation="eager")
    if fused:
        fuse_(model)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for batch in (2, 3, 5):
        tokens = torch.randint(0, 97, (batch, 7))
        expected = model(tokens, use_cache=False).logits
        torch.testing.assert_close(compiled(tokens, use_cache=False).logits, expected)
    assert counter.frame_count == 1
    assert not any(isinstance(module, FusedGroup) and module.pending.outputs for module in model.modules())
