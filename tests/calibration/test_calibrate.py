"""calibrate: fine-tuning of blocks, and a work folder from which a run that was killed goes on."""

import copy
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aqlm_tensor import AQLMTensor, FinetuneConfig, calibrate
from aqlm_tensor.calibration.report import Progress
from aqlm_tensor.training import Precision
from tests.models import config
from tests.test_blocks import Decoder, batches, weights

TUNING = FinetuneConfig(epochs=3, lr=3e-3)


class Normed(Decoder):
    """A decoder whose blocks have a norm."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.up = nn.Sequential(nn.LayerNorm(32), block.get_submodule("up"))


def norm_of(model: nn.Module) -> Tensor:
    return model.get_parameter("blocks.0.up.0.weight")


def model_and_data(seed: int = 0) -> tuple[Normed, list[Tensor]]:
    torch.manual_seed(seed)
    return Normed(), batches(6)


def state(model: nn.Module) -> dict[str, Tensor]:
    """Every number of a model by name."""
    found: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        parts = value.parts() if isinstance(value, AQLMTensor) else (value,)
        found |= {f"{name}.{index}": part for index, part in enumerate(parts)}
    return found


def assert_same(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = state(one), state(other)
    assert list(ours) == list(theirs)
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different


def output_error(model: nn.Module, dense: nn.Module, data: list[Tensor]) -> float:
    with torch.no_grad():
        pairs = [(model(batch), dense(batch)) for batch in data]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs))


def test_fine_tuning_lowers_the_error_and_leaves_codes_and_dense_matrices_alone() -> None:
    dense, data = model_and_data()
    plain, tuned = copy.deepcopy(dense), copy.deepcopy(dense)
    calibrate(plain, config("2x2g8"), data)
    report = calibrate(tuned, config("2x2g8"), data, finetune=TUNING)
    assert [block.block for block in report.blocks] == [0, 1, 2]
    assert all(block.error_after < block.error_before for block in report.blocks)
    assert output_error(tuned, dense, data) < output_error(plain, dense, data)
    first = "blocks.0.up.1.weight"
    assert torch.equal(weights(tuned)[first].codes, weights(plain)[first].codes)
    assert not torch.equal(weights(tuned)[first].codebooks, weights(plain)[first].codebooks)
    assert not torch.equal(norm_of(tuned), norm_of(dense)), "norms are tuned, too"
    assert torch.equal(tuned.head.weight, dense.head.weight)
    assert all(p.grad is None for p in tuned.parameters())
    assert [p.requires_grad for p in tuned.head.parameters()] == [True, True]


def test_a_hopeless_learning_rate_changes_nothing() -> None:
    dense, data = model_and_data()
    plain, tuned = copy.deepcopy(dense), copy.deepcopy(dense)
    calibrate(plain, config(), data)
    report = calibrate(tuned, config(), data, finetune=FinetuneConfig(lr=1e3))
    assert all(block.error_after == block.error_before for block in report.blocks)
    assert_same(plain, tuned)


def test_half_precision_models_are_tuned_in_float32() -> None:
    dense, data = model_and_data()
    model = copy.deepcopy(dense).bfloat16()
    report = calibrate(model, config("2x2g8"), data, finetune=TUNING)
    assert all(block.error_after < block.error_before for block in report.blocks)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    model(data[0])


def test_mixed_precision_tunes_as_well() -> None:
    dense, data = model_and_data()
    products: dict[str, set[torch.dtype]] = {}
    after: dict[str, float] = {}
    settings: list[Precision] = ["float32", "bfloat16"]
    for precision in settings:
        model, seen = copy.deepcopy(dense), products.setdefault(precision, set())

        def see(_layer: nn.Module, _inputs: Any, output: Tensor, seen: set[torch.dtype] = seen) -> None:
            if output.requires_grad:
                seen.add(output.dtype)

        for layer in (module for module in model.modules() if isinstance(module, nn.Linear)):
            layer.register_forward_hook(see)
        report = calibrate(model, config("2x2g8"), data, finetune=replace(TUNING, precision=precision))
        assert all(block.error_after < block.error_before for block in report.blocks)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        after[precision] = report.blocks[0].error_after
    assert products == {"float32": {torch.float32}, "bfloat16": {torch.bfloat16}}
    assert after["bfloat16"] == pytest.approx(after["float32"], rel=0.01)  # later blocks get other codes
    assert after["bfloat16"] != after["float32"]


def test_precision_is_checked() -> None:
    with pytest.raises(ValueError, match="precision must be one of auto, float32, bfloat16, got 'half'"):
        FinetuneConfig(precision="half")  # pyright: ignore[reportArgumentType]


class Killed(BaseException):
    """What a test raises in place of a kill."""


def killed_at(step: int, model: nn.Module, data: list[Tensor], folder: Path, *, resume: bool) -> bool:
    """Run `calibrate` but stop at a step; whether that came before the end."""
    steps = 0

    def count(_: Progress) -> None:
        nonlocal steps
        steps += 1
        if steps == step:
            raise Killed

    try:
        calibrate(model, config(), data, finetune=TUNING, work_dir=folder, resume=resume, on_progress=count)
    except Killed:
        return True
    return False


def test_killed_at_random_points_and_resumed_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    dense, data = model_and_data()
    whole = copy.deepcopy(dense)
    report = calibrate(whole, config(), data, finetune=TUNING)
    choose = random.Random(0)
    kills = 0
    for attempt in range(20):
        folder = tmp_path / str(attempt)
        model = copy.deepcopy(dense)
        resume = False
        while killed_at(choose.randint(2, 17), model, data, folder, resume=resume):
            kills += 1
            model, resume = copy.deepcopy(dense), True
        assert_same(model, whole)
        again = copy.deepcopy(dense)
        repeated = calibrate(again, config(), data, finetune=TUNING, work_dir=folder, resume=True)
        assert_same(again, whole)
        assert [layer.fqn for layer in repeated.layers] == [layer.fqn for layer in report.layers]
        assert [block.error_after for block in repeated.blocks] == [block.error_after for block in report.blocks]
    assert kills > 20


def test_a_resumed_run_repeats_no_finished_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, data = model_and_data()
    assert killed_at(10, copy.deepcopy(dense), data, tmp_path, resume=False)  # in the second block
    finished = len(list(tmp_path.glob("layer.*")))
    assert finished > 2
    from aqlm_tensor import handler

    solved: list[int] = []
    solve = handler.quantize_layer
    monkeypatch.setattr(handler, "quantize_layer", lambda *args, **kwargs: solved.append(1) or solve(*args, **kwargs))
    calibrate(copy.deepcopy(dense), config(), data, finetune=TUNING, work_dir=tmp_path, resume=True)
    assert len(solved) == 6 - finished


def test_what_a_work_folder_was_made_from_is_checked(tmp_path: Path) -> None:
    dense, data = model_and_data()
    calibrate(copy.deepcopy(dense), config(), data, work_dir=tmp_path)
    with pytest.raises(FileExistsError, match="resume=True"):
        calibrate(dense, config(), data, work_dir=tmp_path)
    with pytest.raises(ValueError, match="another settings"):
        calibrate(dense, config(seed=1), data, work_dir=tmp_path, resume=True)
    with pytest.raises(ValueError, match="another data"):
        calibrate(dense, config(), batches(6), work_dir=tmp_path, resume=True)
    other, _ = model_and_data(seed=5)
    with pytest.raises(ValueError, match="another model"):
        calibrate(other, config(), data, work_dir=tmp_path, resume=True)
    assert not weights(dense)
    assert not weights(other)
    with pytest.raises(ValueError, match="needs the work_dir"):
        calibrate(dense, config(), data, resume=True)
    (tmp_path / "state.json").unlink()
    with pytest.raises(ValueError, match="no work folder"):
        calibrate(dense, config(), data, work_dir=tmp_path, resume=True)


@pytest.mark.parametrize("fields", [{"epochs": 0}, {"lr": 0.0}, {"validation": 1.0}, {"patience": 0}])
def test_bad_settings_name_the_value(fields: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(fields))} must .*got {next(iter(fields.values()))}"):
        FinetuneConfig(**fields)


def test_fine_tuning_needs_a_batch_to_validate_on() -> None:
    dense, data = model_and_data()
    with pytest.raises(ValueError, match="at least 2 batches"):
        calibrate(dense, config(), data[:1], finetune=TUNING)
    assert not weights(dense)
