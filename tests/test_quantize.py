"""quantize_: which layers, what is refused before anything changes, and that nothing is left half done."""

import copy
import logging
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig
from torchao.quantization import quantize_ as torchao_quantize_

import aqlm_tensor.api
import aqlm_tensor.handler
from aqlm_tensor import AQLMTensor, quantize_
from aqlm_tensor.handler import LayerReport

from .models import TiedLM, config, mlp


def weight(model: nn.Module, fqn: str) -> AQLMTensor:
    found = model.get_submodule(fqn).weight
    assert isinstance(found, AQLMTensor)
    return found


def is_dense(model: nn.Module) -> bool:
    return not any(isinstance(parameter, AQLMTensor) for parameter in model.parameters())


def test_every_linear_layer_stays_a_linear_layer() -> None:
    model = mlp()
    dense = copy.deepcopy(model)
    x = torch.randn(5, 64)
    report = quantize_(model, config())
    assert [layer.fqn for layer in report.layers] == ["0", "2", "4"]
    for fqn in ("0", "2", "4"):
        assert type(model.get_submodule(fqn)) is nn.Linear
        assert not weight(model, fqn).requires_grad
        # the weight is the quantized one, not just any
        error = (weight(model, fqn).dequantize() - dense.get_submodule(fqn).weight).norm()
        assert error < 0.7 * dense.get_submodule(fqn).weight.norm()
    dequantized = copy.deepcopy(dense)
    for fqn in ("0", "2", "4"):
        dequantized.get_submodule(fqn).weight = nn.Parameter(weight(model, fqn).dequantize())
    torch.testing.assert_close(model(x), dequantized(x))
    assert "2x4g8" in repr(model)


def test_reported_error_is_the_error_of_the_weight() -> None:
    model = mlp()
    dense = model[0].weight.detach().clone()
    (first, *_) = quantize_(model, config()).layers
    assert first.relative_error == pytest.approx(
        float((weight(model, "0").dequantize() - dense).square().sum() / dense.square().sum()), rel=1e-3
    )
    assert first.bits_per_weight == weight(model, "0").bits_per_weight


def test_filter_fn_gets_module_and_name() -> None:
    model = mlp()
    quantize_(model, config(), lambda module, fqn: isinstance(module, nn.Linear) and fqn != "2")
    assert isinstance(model[0].weight, AQLMTensor)
    assert not isinstance(model[2].weight, AQLMTensor)


def test_a_filter_by_name_passes_over_what_holds_the_layers() -> None:
    model = nn.ModuleDict({"block": nn.Sequential(mlp(), nn.LayerNorm(64)), "other": mlp()})
    report = quantize_(model, config(), lambda module, fqn: "block" in fqn)
    assert [layer.fqn for layer in report.layers] == ["block.0.0", "block.0.2", "block.0.4"]


def test_same_seed_same_codes_other_seed_other_codes() -> None:
    models = [mlp() for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    for model, seed in zip(models, (1, 1, 2), strict=True):
        quantize_(model, config(seed=seed))
    codes = [weight(model, "0").codes for model in models]
    assert torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2])


def test_codebook_dtype_becomes_the_dtype_of_the_weight() -> None:
    model = mlp().double()
    with pytest.raises(TypeError, match="codebook_dtype"):
        quantize_(model, config())
    quantize_(model, config(codebook_dtype=torch.float16))
    assert weight(model, "0").dtype == torch.float16


def test_scheme_per_layer_with_fqn_to_config() -> None:
    model = mlp()
    by_name = FqnToConfig(OrderedDict({"0": config("1x4g16"), "re:[24]": config("2x4g8"), "4": None}))
    quantize_(model, by_name)
    assert str(weight(model, "0").scheme) == "1x4g16"
    assert str(weight(model, "2").scheme) == "2x4g8"
    assert not isinstance(model[4].weight, AQLMTensor)


def test_fqn_to_config_may_mix_in_torchao_configs() -> None:
    model = mlp()
    quantize_(model, FqnToConfig(OrderedDict({"0": config(), "4": Int8WeightOnlyConfig()})))
    assert isinstance(model[0].weight, AQLMTensor)
    assert type(model[4].weight).__name__ == "Int8Tensor"


def test_torchao_quantize_accepts_our_config() -> None:
    model = mlp()
    torchao_quantize_(model, config())
    assert all(isinstance(model[i].weight, AQLMTensor) for i in (0, 2, 4))
    with pytest.raises(ValueError, match="already quantized"):
        torchao_quantize_(model, config())


def test_tied_and_shared_weights() -> None:
    model = TiedLM()
    report = quantize_(model, config())
    assert model.head.weight is model.embedding.weight
    assert not isinstance(model.head.weight, AQLMTensor)
    assert list(report.skipped) == ["head"]
    assert model.first.weight is model.second.weight
    assert [layer.fqn for layer in report.layers] == ["up", "first"]


def test_output_embedding_stays_dense_unless_asked_for() -> None:
    model = TiedLM()
    model.head = nn.Linear(64, 64, bias=False)
    assert "head" in quantize_(copy.deepcopy(model), config()).skipped
    asked = copy.deepcopy(model)
    quantize_(asked, config(), lambda module, fqn: fqn == "head")
    assert isinstance(asked.head.weight, AQLMTensor)


def test_tied_head_stays_dense_even_if_asked_for() -> None:
    model = TiedLM()
    report = quantize_(model, config(), lambda module, _: isinstance(module, nn.Linear))
    assert "shared with embedding" in report.skipped["head"]


def test_incompatible_layers_raise_or_are_skipped() -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 36), nn.Linear(36, 8))
    with pytest.raises(ValueError, match=r"2 cannot be quantized to 2x4g8: in_features 36.*on_incompatible"):
        quantize_(model, config())
    assert is_dense(model)
    report = quantize_(model, config(on_incompatible="skip"))
    assert list(report.skipped) == ["2"]


def test_layer_that_would_not_shrink_is_incompatible() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(ValueError, match="no less than the dense 16384 bytes"):
        quantize_(model, config("1x16g8"))


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (lambda model: model[4].weight.data.fill_(float("nan")), ValueError, "4 has NaN"),
        (lambda model: model[4].to("meta"), ValueError, "4 is on the meta device"),
        (
            lambda model: nn.utils.parametrizations.weight_norm(model[4]),
            ValueError,
            "4 has a parametrized weight.*remove_parametrizations",
        ),
        (lambda model: quantize_(model[4:], config()), ValueError, "4 is already quantized"),
        (lambda model: torchao_quantize_(model[4:], Int8WeightOnlyConfig()), TypeError, "4 has a weight of type"),
    ],
)
def test_bad_layer_is_refused_before_any_layer_changes(spoil, error: type[Exception], words: str) -> None:
    model = mlp()
    spoil(model)
    with pytest.raises(error, match=words):
        quantize_(model, config())
    assert not isinstance(model[0].weight, AQLMTensor)


def test_no_matching_layer_lists_the_types_seen() -> None:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

    with pytest.raises(ValueError, match=r"Conv1D \(2\).*Conv1D"):
        quantize_(nn.Sequential(Conv1D(), Conv1D()), config())
    with pytest.raises(TypeError, match="0 is a Conv1D"):
        quantize_(nn.Sequential(Conv1D()), config(), lambda module, fqn: fqn == "0")


def test_wrong_config_types() -> None:
    with pytest.raises(TypeError, match="AQLMWeightConfig"):
        quantize_(mlp(), Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match="filter_fn and FqnToConfig"):
        quantize_(mlp(), FqnToConfig(OrderedDict({"0": config()})), lambda module, fqn: True)
    with pytest.raises(TypeError, match="1 is a ReLU"):
        quantize_(mlp(), FqnToConfig(OrderedDict({"1": config()})))


def test_exception_in_the_middle_leaves_whole_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    x = torch.randn(3, 64)
    real, calls = aqlm_tensor.handler.quantize_layer, []

    def fails_second(*args: object, **kwargs: object) -> object:
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return real(*args, **kwargs)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(aqlm_tensor.handler, "quantize_layer", fails_second)
    with pytest.raises(RuntimeError, match="out of memory"):
        quantize_(model, config())
    assert [isinstance(model[i].weight, AQLMTensor) for i in (0, 2, 4)] == [True, False, False]
    assert model(x).isfinite().all()


def test_progress_and_summary() -> None:
    seen: list[LayerReport] = []
    report = quantize_(mlp(), config(), on_layer=seen.append)
    assert tuple(seen) == report.layers
    assert "quantized 3 layers" in str(report)


def test_data_free_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    aqlm_tensor.api._say_data_free_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="aqlm_tensor.api"):
        quantize_(mlp(), config())
        quantize_(mlp(), config())
    assert sum("without data" in record.message for record in caplog.records) == 1
