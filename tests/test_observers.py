"""prepare and convert: X^T X is exact for every layer, shared where inputs are, whatever the order of calls."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from aqlm_tensor import AQLMTensor, quantize_
from aqlm_tensor.quantizer.observers import observer_of

from .models import Attention, TiedLM, config, mlp


def hessians(model: nn.Module) -> dict[str, Tensor | None]:
    return {
        fqn: observer.hessian()
        for fqn, module in model.named_modules()
        if (observer := observer_of(module)) is not None
    }


def test_hessian_is_x_transposed_x_over_all_batches() -> None:
    model = mlp()
    inputs: dict[str, list[Tensor]] = {fqn: [] for fqn in ("0", "2", "4")}
    for fqn, seen in inputs.items():
        model.get_submodule(fqn).register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].double()))
    report = quantize_(model, config(step="prepare"))
    assert report.prepared == ("0", "2", "4")
    for rows in (3, 1, 0, 7):
        model(torch.randn(rows, 64))
    for fqn, hessian in hessians(model).items():
        x = torch.cat(inputs[fqn])
        assert hessian is not None
        torch.testing.assert_close(hessian.double(), x.T @ x, rtol=1e-5, atol=1e-5)


def test_layers_with_one_input_share_one_accumulator() -> None:
    model = Attention()
    quantize_(model, config(step="prepare"))
    for _ in range(3):
        model(torch.randn(2, 5, 64))
    groups = {name: observer_of(getattr(model, name))._group for name in "qkvo"}  # pyright: ignore
    assert groups["q"] is groups["k"] is groups["v"]
    assert groups["o"] is not groups["q"]
    assert all(observer_of(getattr(model, name)).tokens == 30 for name in "qkvo")  # pyright: ignore


@given(
    calls=st.lists(
        st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 1)), min_size=1, max_size=5), min_size=1, max_size=5
    ),
    keep=st.booleans(),
)
def test_any_order_of_calls_gives_each_layer_its_own_sum(calls: list[list[tuple[str, int]]], keep: bool) -> None:
    """Layers that join, leave, miss a batch or are called twice: each sum is exactly that of the inputs it saw."""
    layers = nn.ModuleDict({name: nn.Linear(16, 256) for name in "abc"})
    quantize_(layers, config(step="prepare"))
    seen: dict[str, list[Tensor]] = {name: [torch.zeros(0, 16)] for name in "abc"}
    kept = []
    for batch in calls:
        inputs = [torch.randn(2, 16), torch.randn(3, 16)]
        kept += inputs if keep else []
        for name, which in batch:
            layers[name](inputs[which])
            seen[name].append(inputs[which].clone())
        del inputs
    for name, hessian in hessians(layers).items():
        x = torch.cat(seen[name]).double()
        if hessian is None:
            assert len(x) == 0
        else:
            torch.testing.assert_close(hessian.double(), x.T @ x, rtol=1e-5, atol=1e-5)
        observer = observer_of(layers[name])
        assert observer is not None
        assert observer.tokens == len(x)


def test_input_changed_in_place_is_another_input() -> None:
    layers = nn.ModuleList([nn.Linear(16, 256), nn.Linear(16, 256)])
    quantize_(layers, config(step="prepare"))
    x = torch.randn(4, 16)
    layers[0](x)
    x.mul_(2)
    layers[1](x)
    first, second = hessians(layers).values()
    assert first is not None
    assert second is not None
    torch.testing.assert_close(second, 4 * first)


def test_calibrated_codes_lower_the_activation_error() -> None:
    torch.manual_seed(1)
    mix = torch.randn(64, 64) @ torch.diag(torch.linspace(0.01, 3, 64))
    x = torch.randn(500, 64) @ mix
    dense: Any = nn.Sequential(nn.Linear(64, 256))
    blind, calibrated = copy.deepcopy(dense), copy.deepcopy(dense)
    quantize_(blind, config())
    quantize_(calibrated, config(step="prepare"))
    calibrated(x)
    (report,) = quantize_(calibrated, config(step="convert")).layers
    assert report.tokens == 500
    with torch.no_grad():
        errors = [float((model(x) - dense(x)).square().sum()) for model in (blind, calibrated)]
        reference = float((x @ dense[0].weight.T).square().sum())
    assert errors[1] < 0.8 * errors[0]
    assert report.relative_error == pytest.approx(errors[1] / reference, rel=1e-3)


def test_shared_weight_counts_the_inputs_of_all_its_layers() -> None:
    model = TiedLM()
    quantize_(model, config(step="prepare"))
    model(torch.randint(0, 50, (7,)))
    report = quantize_(model, config(step="convert"))
    assert {layer.fqn: layer.tokens for layer in report.layers} == {"up": 7, "first": 14}
    assert model.first.weight is model.second.weight


def test_convert_removes_every_observer_and_hook() -> None:
    model = mlp()
    quantize_(model, config(step="prepare"))
    model(torch.randn(4, 64))
    quantize_(model, config(step="convert"))
    assert not hessians(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_wrong_order_of_steps() -> None:
    model = mlp()
    with pytest.raises(ValueError, match="no nn.Linear layer matched"):
        quantize_(model, config(step="convert"))
    with pytest.raises(ValueError, match=r"0 has no observer.*prepare"):
        quantize_(model, config(step="convert"), lambda module, _: isinstance(module, nn.Linear))
    quantize_(model, config(step="prepare"))
    with pytest.raises(ValueError, match="already prepared"):
        quantize_(model, config(step="prepare"))
    with pytest.raises(ValueError, match="already prepared"):
        quantize_(model, config())
    with pytest.raises(ValueError, match="no layer saw any data"):
        quantize_(model, config(step="convert", on_unobserved="data_free"))
    model(torch.randn(2, 64))
    with pytest.raises(ValueError, match="prepared for 2x4g8.*converted to 1x4g8"):
        quantize_(model, config("1x4g8", step="convert"))
    quantize_(model, config(step="convert"))
    with pytest.raises(ValueError, match="already quantized"):
        quantize_(model, config(step="convert"))


@pytest.mark.parametrize("choice", ["raise", "skip", "data_free"])
def test_layers_that_saw_no_data(choice: str) -> None:
    model = mlp()
    quantize_(model, config(step="prepare"))
    model[0](torch.randn(4, 64))
    if choice == "raise":
        with pytest.raises(ValueError, match=r"2 of 3 layers saw no data: 2, 4.*on_unobserved"):
            quantize_(model, config(step="convert"))
        assert not isinstance(model[0].weight, AQLMTensor)
        return
    report = quantize_(model, config(step="convert", on_unobserved=choice))
    assert isinstance(model[2].weight, AQLMTensor) == (choice == "data_free")
    assert set(report.skipped) == ({"2", "4"} if choice == "skip" else set())
    assert not hessians(model)


def test_convert_again_after_a_failure_finishes_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    import aqlm_tensor.handler

    model = mlp()
    quantize_(model, config(step="prepare"))
    model(torch.randn(4, 64))
    real, calls = aqlm_tensor.handler.quantize_layer, []

    def fails_second(*args: object, **kwargs: object) -> object:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(aqlm_tensor.handler, "quantize_layer", fails_second)
    with pytest.raises(KeyboardInterrupt):
        quantize_(model, config(step="convert"))
    report = quantize_(model, config(step="convert"))
    assert [layer.fqn for layer in report.layers] == ["2", "4"]
    assert all(isinstance(model[i].weight, AQLMTensor) for i in (0, 2, 4))


def test_non_finite_inputs_are_refused() -> None:
    model = mlp()
    quantize_(model, config(step="prepare"))
    with pytest.raises(ValueError, match="NaN"):
        model(torch.full((2, 64), float("nan")))


def test_memory_limit_is_refused_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    from aqlm_tensor.quantizer import observers

    monkeypatch.setattr(observers, "_total_memory", lambda _: 1000)
    model = mlp()
    quantize_(model, config(step="prepare"))
    with pytest.raises(MemoryError, match="fewer layers"):
        model(torch.randn(2, 64))
