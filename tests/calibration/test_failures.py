"""calibrate when memory or the disk runs out: what it says, what it keeps, and that resuming gives the same bits."""

import copy
import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aqlm_tensor import calibrate, handler
from aqlm_tensor.calibration.report import Progress
from tests.calibration.test_calibrate import TUNING, assert_same, model_and_data
from tests.models import config

SOLVE = handler.quantize_layer


def resumed_like_whole(dense: nn.Module, data: list[Tensor], folder: Path) -> None:
    """Resume in the folder and compare with a run without any trouble."""
    whole, model = copy.deepcopy(dense), copy.deepcopy(dense)
    calibrate(whole, config(), data, finetune=TUNING)
    calibrate(model, config(), data, finetune=TUNING, work_dir=folder, resume=True)
    assert_same(model, whole)


def notes(caught: pytest.ExceptionInfo[BaseException]) -> str:
    return "\n".join(getattr(caught.value, "__notes__", []))


def failing_at(count: int, error: BaseException) -> Any:
    """A stand-in for the layer solver that fails at its n-th call."""
    calls = 0

    def solve(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            raise error
        return SOLVE(*args, **kwargs)

    return solve


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError("X^T X would take 90 GB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_out_of_memory_names_the_remedy_and_resumes_to_the_same_bits(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, data = model_and_data()
    monkeypatch.setattr(handler, "quantize_layer", failing_at(4, error))
    with pytest.raises(type(error)) as caught:
        calibrate(copy.deepcopy(dense), config(), data, finetune=TUNING, work_dir=tmp_path)
    said = notes(caught)
    assert "block 2 of 3 (quantize)" in said
    assert f"3 finished layers are kept in {tmp_path}: go on from there with resume=True" in said
    assert 'keep_inputs="cpu" or "disk"' in said
    monkeypatch.undo()
    resumed_like_whole(dense, data, tmp_path)


def test_without_a_work_folder_it_says_that_nothing_was_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, data = model_and_data()
    monkeypatch.setattr(handler, "quantize_layer", failing_at(2, MemoryError()))
    with pytest.raises(MemoryError) as caught:
        calibrate(dense, config(), data)
    assert "pass work_dir to keep finished layers" in notes(caught)
    dense(data[0])  # each layer is dense or quantized


def test_other_errors_carry_no_such_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, data = model_and_data()
    monkeypatch.setattr(handler, "quantize_layer", failing_at(2, RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug") as caught:
        calibrate(dense, config(), data, work_dir=tmp_path)
    assert notes(caught) == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("file", ["layer.blocks.1.down.partial", "block.00001.partial", "state.partial"])
def test_a_full_disk_leaves_no_half_file_and_resumes_to_the_same_bits(file: str, tmp_path: Path) -> None:
    dense, data = model_and_data()
    (tmp_path / file).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        calibrate(copy.deepcopy(dense), config(), data, finetune=TUNING, work_dir=tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert str(tmp_path) in str(caught.value)
    assert "Make room on the disk" in notes(caught)
    assert not list(tmp_path.glob("*.partial"))
    resumed_like_whole(dense, data, tmp_path)


def test_a_full_disk_of_inputs_leaves_none_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, data = model_and_data()
    write = Path.write_bytes

    def full(path: Path, content: Any) -> int:
        if path.name == "4.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        calibrate(copy.deepcopy(dense), config(), data, keep_inputs="disk", work_dir=tmp_path)
    monkeypatch.undo()
    (tmp_path / "inputs.killed").mkdir()  # what a killed run leaves is removed by the next
    resumed = copy.deepcopy(dense)
    calibrate(resumed, config(), data, work_dir=tmp_path, resume=True)
    whole = copy.deepcopy(dense)
    calibrate(whole, config(), data)
    assert_same(resumed, whole)
    assert not list(tmp_path.glob("inputs.*"))


def test_values_that_are_not_finite_are_told_with_their_block() -> None:
    dense, data = model_and_data()
    with torch.no_grad():
        dense.get_parameter("blocks.1.up.0.bias")[:] = torch.inf
    with pytest.raises(ValueError, match="inputs hold NaN, infinite or overflowing values") as caught:
        calibrate(dense, config(), data)
    assert notes(caught) == "This was in block 2 of 3 (calibrate)."


def test_one_run_at_a_time_works_in_a_folder(tmp_path: Path) -> None:
    dense, data = model_and_data()

    def begin_again(_: Progress) -> None:
        calibrate(copy.deepcopy(dense), config(), data, work_dir=tmp_path, resume=True)

    with pytest.raises(ValueError, match="another run is at work in"):
        calibrate(copy.deepcopy(dense), config(), data, work_dir=tmp_path, on_progress=begin_again)
    resumed = copy.deepcopy(dense)
    calibrate(resumed, config(), data, work_dir=tmp_path, resume=True)
    calibrate(dense, config(), data)
    assert_same(resumed, dense)


def test_the_report_is_json_and_complete(tmp_path: Path) -> None:
    dense, data = model_and_data()
    model = copy.deepcopy(dense)
    report = calibrate(model, config("2x3g8"), data, finetune=TUNING, work_dir=tmp_path, data_origin={"file": "a.txt"})
    read = json.loads(report.to_json())
    assert [layer["fqn"] for layer in read["layers"]] == [layer.fqn for layer in report.layers]
    first = read["layers"][0]
    weight, quantized = dense.get_parameter("blocks.0.up.1.weight"), model.get_parameter("blocks.0.up.1.weight")
    # before fine-tuning, which changes codebooks and scales
    plain = copy.deepcopy(dense)
    calibrate(plain, config("2x3g8"), data)
    untuned = plain.get_parameter("blocks.0.up.1.weight").dequantize()  # pyright: ignore[reportCallIssue]
    assert not torch.equal(untuned, quantized.dequantize())  # pyright: ignore[reportCallIssue]
    expected = float(((untuned - weight).square().sum() / weight.square().sum()).detach())
    assert first["weight_error"] == pytest.approx(expected, 1e-4)
    assert first["scheme"] == "2x3g8"
    assert read["totals"]["layers"] == 6
    assert read["totals"]["weights"] == sum(64 * 32 for _ in range(6))
    errors = [layer["relative_error"] for layer in read["layers"]]
    assert read["totals"]["activation_error"] == pytest.approx(sum(errors) / 6)
    assert [block["block"] for block in read["blocks"]] == [0, 1, 2]
    assert read["settings"]["config"]["_data"]["scheme"] == "2x3g8"
    assert read["settings"]["finetune"]["epochs"] == TUNING.epochs
    assert (read["data"]["batches"], read["data"]["tokens"], read["data"]["origin"]["file"]) == (6, 6 * 32, "a.txt")
    assert read["versions"]["torch"] == torch.__version__
    assert set(read["seconds"]) == {"capture", "calibrate", "quantize", "fine-tune", "propagate"}
    assert read["peak_memory_bytes"]["host"] > 1e6
    assert not read["resumed"]
    again = calibrate(copy.deepcopy(dense), config("2x3g8"), data, finetune=TUNING, work_dir=tmp_path, resume=True)
    assert again.run is not None
    assert again.run.resumed
    assert again.layers == report.layers
    other = calibrate(copy.deepcopy(dense), config("2x3g8"), model_and_data(seed=3)[1])
    assert other.run is not None
    assert other.run.data["sha256"] != read["data"]["sha256"]


def test_phases_take_most_of_the_time() -> None:
    dense, data = model_and_data()
    seen: list[Progress] = []
    report = calibrate(dense, config(), data, on_progress=seen.append)
    assert report.run is not None
    assert sum(report.run.seconds.values()) > sum(layer.seconds for layer in report.layers)
    assert {progress.phase for progress in seen} == {"capture", "calibrate", "quantize", "propagate"}


def test_a_kill_while_the_first_file_is_written_can_be_resumed(tmp_path: Path) -> None:
    (tmp_path / "state.partial").write_text("{")
    dense, data = model_and_data()
    calibrate(copy.deepcopy(dense), config(), data, work_dir=tmp_path)
    assert len(list(tmp_path.glob("layer.*"))) == 6
