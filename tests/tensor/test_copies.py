"""Copies, casts, serialization and state_dicts of AQLMTensors and of modules that hold them."""

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aqlm_tensor.tensor import AQLMTensor
from tests.tensor.weights import as_aqlm, random_weight, weight_of

X = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))

VIEWS: dict[str, Callable[[], AQLMTensor]] = {
    "matrix": random_weight,
    "bfloat16": lambda: random_weight(dtype=torch.bfloat16),
    "int16 codes": lambda: random_weight("1x12g8"),
    "partitions": lambda: random_weight(partitions=4),
    "transposed": lambda: as_aqlm(random_weight().t()),
    "row": lambda: as_aqlm(random_weight()[3]),
    "slice": lambda: as_aqlm(random_weight(partitions=4)[8:24, 16:32]),
    "experts": lambda: random_weight(experts=3),
}
every_view = pytest.mark.parametrize("make", VIEWS.values(), ids=VIEWS)


def _linear(seed: int = 0) -> nn.Linear:
    linear = nn.Linear(64, 32).requires_grad_(False)
    linear.weight = nn.Parameter(random_weight(seed=seed), requires_grad=False)
    return linear


def _assert_same(a: object, b: AQLMTensor, *, shared: bool = False) -> None:
    assert isinstance(a, AQLMTensor)
    assert (a.shape, a.dtype, a.orientation) == (b.shape, b.dtype, b.orientation)
    for mine, yours in zip(a.parts(), b.parts(), strict=True):
        assert torch.equal(mine, yours)
        assert (mine.data_ptr() == yours.data_ptr()) is shared


def _saved(obj: object, *, weights_only: bool = True) -> Any:
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=weights_only)


@every_view
def test_copies_are_independent_and_equal(make: Callable[[], AQLMTensor]) -> None:
    w = make()
    for duplicate in (w.clone(), copy.deepcopy(w), pickle.loads(pickle.dumps(w)), _saved(w), w.to("cpu", copy=True)):
        _assert_same(duplicate, w)
    _assert_same(copy.copy(w), w, shared=True)
    _assert_same(w.detach(), w, shared=True)
    assert w.to("cpu") is w
    assert w.to(w.dtype) is w


def test_parameters_stay_parameters() -> None:
    p = nn.Parameter(random_weight(), requires_grad=False)
    for duplicate in (copy.deepcopy(p), _saved(p), pickle.loads(pickle.dumps(p))):
        assert isinstance(duplicate, nn.Parameter)
        assert not duplicate.requires_grad
        _assert_same(duplicate, random_weight())
    module = _linear()
    assert isinstance(copy.deepcopy(module).weight, nn.Parameter)
    saved = _saved(module, weights_only=False)
    assert isinstance(saved, nn.Linear)
    assert torch.equal(saved(X), module(X))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_casts(dtype: torch.dtype) -> None:
    w = random_weight()
    cast = AQLMTensor(w.codes, w.codebooks.to(dtype), w.scales.to(dtype))
    like = torch.zeros(1, dtype=dtype)
    for other in (w.to(dtype), w.to("cpu", dtype), w.to(like), w.type(dtype), w.type_as(like)):
        assert other.dtype == dtype
        assert torch.equal(as_aqlm(other).dequantize(), cast.dequantize())
    module = _linear().to(dtype)
    assert module.weight.dtype == dtype
    assert module(X.to(dtype)).dtype == dtype
    assert w.dtype == torch.float32, "the original changed"


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_refuses_other_dtypes(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"cast to float32, float16 or bfloat16, not {dtype}"):
        random_weight().to(dtype)


def test_swapping_parameters_on_conversion() -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module = _linear()
        weight = module.weight
        module.to(torch.bfloat16)
        assert module.weight is weight
        assert module(X.bfloat16()).dtype == torch.bfloat16
        module.load_state_dict(_linear(seed=3).bfloat16().state_dict())
        assert torch.equal(weight_of(module).dequantize(), weight_of(_linear(seed=3).bfloat16()).dequantize())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    a, b = random_weight(seed=1), as_aqlm(random_weight(seed=2).t())
    torch.utils.swap_tensors(a, b)
    _assert_same(b, random_weight(seed=1))
    _assert_same(a, as_aqlm(random_weight(seed=2).t()))


def test_data_can_be_replaced() -> None:
    p = nn.Parameter(random_weight(), requires_grad=False)
    new = random_weight(seed=1)
    p.data = new
    assert torch.equal(F.linear(X, p), F.linear(X, new))
    with pytest.raises(TypeError, match="can only be replaced by another one"):
        p.data = torch.zeros(32, 64)


def test_copy_into() -> None:
    w, other = random_weight(), random_weight(seed=1)
    codes = w.codes
    assert w.copy_(other) is w
    assert w.codes is codes
    _assert_same(w, other)
    w.copy_(random_weight(seed=2, dtype=torch.float16))
    assert w.dtype == torch.float32
    for dense in (torch.zeros(32, 64), torch.zeros(64)):
        with pytest.raises(TypeError, match="quantize the source"):
            w.copy_(dense)
        with pytest.raises(TypeError, match=r"`\.dequantize\(\)` to copy out"):
            dense.copy_(w)
    with pytest.raises(ValueError, match="same scheme and shape"):
        w.copy_(random_weight("1x8g8"))


def _write_to_some_rows(w: AQLMTensor, new: AQLMTensor) -> None:
    w[:1024].copy_(AQLMTensor(new.codes[:1024], w.codebooks, w.scales[:1024]))


WRITES: dict[str, Callable[[nn.Linear, AQLMTensor], object]] = {
    "copy_": lambda layer, new: layer.weight.copy_(new),
    "load_state_dict": lambda layer, new: layer.load_state_dict({"weight": new}),
    "some rows": lambda layer, new: _write_to_some_rows(weight_of(layer), new),
    "detached": lambda layer, new: layer.weight.detach().copy_(new),
    "multiplied": lambda layer, new: layer.weight.mul_(2),
    "data": lambda layer, new: setattr(layer.weight, "data", new),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("scheme", ["2x8g8", "1x16g8"])
@pytest.mark.parametrize("name", WRITES)
def test_kernels_notice_what_was_written(name: str, scheme: str, inference: bool) -> None:
    """They keep repacked codes of a weight that is large enough, and make them anew after a write."""
    x, size = torch.randn(1, 1024), (2048, 1024)
    with torch.inference_mode(inference):
        layer = nn.Linear(1024, 2048, bias=False).requires_grad_(False)
        layer.weight = nn.Parameter(random_weight(scheme, *size), requires_grad=False)
        before = layer(x)
        WRITES[name](layer, random_weight(scheme, *size, seed=1))
        assert not torch.equal(layer(x), before)
        torch.testing.assert_close(layer(x), F.linear(x, weight_of(layer).dequantize()), rtol=1e-4, atol=1e-2)


def test_state_dict_round_trips(tmp_path: Path) -> None:
    source, file = _linear(seed=1), tmp_path / "model.pt"
    state = source.state_dict()
    assert state["weight"].codes.data_ptr() == weight_of(source).codes.data_ptr()
    torch.save(state, file)
    for loaded in (state, torch.load(file, weights_only=True), torch.load(file, weights_only=True, mmap=True)):
        for assign in (False, True):
            target = _linear(seed=2)
            assert not any(target.load_state_dict(loaded, assign=assign))
            assert torch.equal(target(X), source(X))
    fresh = nn.Linear(64, 32).requires_grad_(False)
    fresh.load_state_dict(state, assign=True)
    assert torch.equal(fresh(X), source(X))


def test_state_dict_errors_name_the_cause() -> None:
    target = _linear()
    for weight, message in (
        (random_weight(out_features=16), "size mismatch for weight"),
        (random_weight("1x8g8"), "same scheme and shape"),
        (torch.zeros(32, 64), "quantize the source with `AQLMTensor.from_hp`"),
    ):
        with pytest.raises(RuntimeError, match=message):
            target.load_state_dict({"weight": weight, "bias": torch.zeros(32)})
    with pytest.raises(RuntimeError, match="requires_grad_\\(False\\)"):
        nn.Linear(64, 32).load_state_dict(target.state_dict(), assign=True)


def test_forward_does_not_change_the_state_dict() -> None:
    module = _linear()
    before = [part.clone() for part in weight_of(module).parts()]
    module(X)
    module(X.requires_grad_()).sum().backward()
    X.requires_grad_(False)
    assert all(torch.equal(a, b) for a, b in zip(before, weight_of(module).parts(), strict=True))


def test_shared_weights_stay_shared() -> None:
    module = nn.ModuleList([_linear(), nn.Linear(64, 32)])
    module[1].weight = weight_of(module[0])  # nn.Parameter by way of nn.Linear
    for other in (copy.deepcopy(module), copy.deepcopy(module).to(torch.bfloat16), _saved(module, weights_only=False)):
        assert weight_of(other[0]) is weight_of(other[1])
    a = random_weight()
    b = AQLMTensor(random_weight(seed=2).codes, a.codebooks, a.scales)
    loaded = _saved([a, b])
    assert loaded[0].codebooks.data_ptr() == loaded[1].codebooks.data_ptr()


def test_meta_and_back() -> None:
    module = _linear().to("meta")
    assert weight_of(module).codes.is_meta
    module.to_empty(device="cpu")
    assert weight_of(module).codes.device.type == "cpu"
    module.load_state_dict(_linear(seed=1).state_dict())
    assert torch.equal(module(X), nn.functional.linear(X, random_weight(seed=1), module.bias))
    with pytest.raises(NotImplementedError, match="meta"):
        _linear().to("meta").to("cpu")


@every_view
def test_empty_like_keeps_the_structure(make: Callable[[], AQLMTensor]) -> None:
    w = make()
    empty = torch.empty_like(w)
    assert isinstance(empty, AQLMTensor)
    assert (empty.shape, empty.dtype, empty.orientation) == (w.shape, w.dtype, w.orientation)
    assert [part.shape for part in empty.parts()] == [part.shape for part in w.parts()]
    assert torch.empty_like(w, dtype=torch.float16).dtype == torch.float16
    assert torch.empty_like(w, device="meta").is_meta


def test_new_tensors() -> None:
    w = random_weight()
    for same in (w.new_zeros(16, 128), torch.zeros_like(w), w.new_zeros(8, 8, dtype=torch.bfloat16)):
        assert isinstance(same, AQLMTensor)
        assert same.scheme == w.scheme
        assert not same.dequantize().any()
    for dense in (
        w.new_zeros(5),
        w.new_zeros(3, 7),
        w.new_zeros(32, 64, dtype=torch.float64),
        w.new_zeros((32, 64), dtype=torch.int64),
        torch.zeros_like(w, dtype=torch.int64),
        w.new_empty(2, 2),
    ):
        assert type(dense) is Tensor
    assert w.new_empty(32, 64).shape == (32, 64)
    assert w.new_zeros(32, 64, device="meta").is_meta
    assert not w.is_pinned()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_pinned_memory_and_back() -> None:
    w = random_weight()
    pinned = as_aqlm(w.pin_memory())
    assert pinned.is_pinned()
    moved = pinned.to("cuda", non_blocking=True)
    assert moved.is_cuda
    _assert_same(moved.cpu(), w)


def test_shared_memory_reaches_another_process() -> None:
    w = random_weight()
    w.share_memory_()
    assert all(part.is_shared() for part in w.parts())
    program = (
        "import pickle, sys, torch\n"
        "import aqlm_tensor.tensor\n"
        "w = pickle.load(sys.stdin.buffer)\n"
        "print(w.dequantize().double().sum().item())\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], input=pickle.dumps(w), capture_output=True, check=True, timeout=120
    )
    assert float(done.stdout.decode().splitlines()[-1]) == w.dequantize().double().sum().item()


def test_optimizers_leave_it_alone() -> None:
    model = nn.Sequential(nn.Linear(64, 64), _linear())
    before = weight_of(model[1]).dequantize()
    optimizer = torch.optim.AdamW(model.parameters())
    model(X).sum().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    assert torch.equal(weight_of(model[1]).dequantize(), before)


def test_equal_compares_values() -> None:
    w, stack = random_weight("2x4g8"), random_weight("2x4g8", experts=2)
    assert torch.equal(w, w.clone())
    assert torch.equal(w, AQLMTensor((w.codes + 16).to(torch.int8), w.codebooks, w.scales)), "other codes, same entries"
    assert torch.equal(w, w.dequantize())
    assert torch.equal(stack.mT, stack.clone().mT)
    for other in (random_weight("2x4g8", seed=1), w[:16], w.t(), w * 2):
        assert not torch.equal(w, other)
    assert not torch.equal(stack, torch.stack([stack[0], w]))


MULTIPLES: dict[str, Callable[[Tensor], Tensor]] = {
    "*": lambda w: w * 0.5,
    "* on the left": lambda w: 2 * w,
    "/": lambda w: w / 4,
    "of a tensor": lambda w: w * torch.tensor(2.0, dtype=torch.float64),
    "in place": lambda w: w.clone().mul_(4),
    "in place, divided": lambda w: w.clone().div_(2),
}


@pytest.mark.parametrize("name", MULTIPLES)
def test_multiples(name: str) -> None:
    for w in (random_weight(dtype=torch.bfloat16), random_weight(experts=2).mT):
        multiple = as_aqlm(MULTIPLES[name](w))
        assert torch.equal(multiple.dequantize(), MULTIPLES[name](as_aqlm(w).dequantize()))
        assert multiple.dtype == w.dtype


@pytest.mark.parametrize("product", [lambda w: w * w, lambda w: w * torch.ones(64), lambda w: torch.tensor(2.0) / w])
def test_other_elementwise_products_are_refused(product: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(NotImplementedError, match="with a single number only: call `.dequantize"):
        product(random_weight())
