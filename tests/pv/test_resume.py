"""A run of tune_pv that was killed goes on to the same bits."""

import copy
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from aqlm_tensor import PVConfig, tune_pv
from aqlm_tensor.pv.report import PVReport, PVRound
from tests.calibration.test_calibrate import assert_same, state
from tests.pv.models import QUICK, divergence, prepared


class Killed(BaseException):
    """What a test raises in place of a kill."""


def killed_after(rounds: int, model: nn.Module, dense: nn.Module, data: list[Tensor], folder: Path) -> PVReport | None:
    """Tune but stop after so many more rounds; the report if that was enough."""
    left = rounds

    def stop(_: PVRound) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed

    try:
        return tune_pv(model, dense, data, config=QUICK, work_dir=folder, resume=True, on_round=stop)
    except Killed:
        return None


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    untuned, dense, data = prepared()
    whole = copy.deepcopy(untuned)
    expected = tune_pv(whole, dense, data, config=QUICK)
    generator = random.Random(0)
    for attempt in range(4):
        report, model = None, untuned
        while report is None:
            model = copy.deepcopy(untuned)
            report = killed_after(generator.choice([1, 2, 3]), model, dense, data, tmp_path / str(attempt))
            assert divergence(model, dense, data[-3:]) <= expected.loss_before * (1 + 1e-6), "the best so far"
        assert_same(whole, model)
        assert report.changed == expected.changed
        assert [r.validation for r in report.rounds] == [r.validation for r in expected.rounds]
    again = copy.deepcopy(untuned)
    done = tune_pv(again, dense, data, config=QUICK, work_dir=tmp_path / "0", resume=True)
    assert_same(whole, again)
    assert done.loss_after == expected.loss_after


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    model, dense, data = prepared()
    tune_pv(copy.deepcopy(model), dense, data, config=QUICK, work_dir=tmp_path)
    before = state(copy.deepcopy(model))
    with pytest.raises(FileExistsError, match="resume=True"):
        tune_pv(model, dense, data, config=QUICK, work_dir=tmp_path)
    with pytest.raises(ValueError, match="another config and data"):
        tune_pv(model, dense, data[1:], config=PVConfig(), work_dir=tmp_path, resume=True)
    with pytest.raises(ValueError, match="another teacher"):
        tune_pv(model, None, data, config=QUICK, work_dir=tmp_path, resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="no folder of a tuning run"):
        tune_pv(model, dense, data, config=QUICK, work_dir=tmp_path / "other", resume=True)
    with pytest.raises(ValueError, match="needs the work_dir"):
        tune_pv(model, dense, data, config=QUICK, resume=True)
    assert all(torch.equal(before[name], value) for name, value in state(model).items())
