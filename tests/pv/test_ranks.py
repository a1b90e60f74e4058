"""tune_pv on two ranks: both end with the same bits, about where one process would, resumed or not."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from aqlm_tensor import AQLMTensor, tune_pv
from aqlm_tensor.pv.report import PVRound
from tests import ranks
from tests.calibration.test_calibrate import assert_same, state
from tests.calibration.test_ranks import counted, everyone
from tests.pv.models import QUICK, codes, prepared

PAIRS = replace(QUICK, batches_per_step=2, epochs=6)


def both_end_alike_and_near_one(rank: int, folder: Path) -> None:
    model, dense, data = prepared()
    alone = copy.deepcopy(model)
    old = codes(model)
    passes = counted(type(model), "forward")
    whole = tune_pv(alone, dense, data, config=PAIRS)
    one = len(passes)
    report = tune_pv(model, dense, data, config=PAIRS, group=everyone())
    both = len(passes) - one
    found: list[Any] = [None, None]
    dist.all_gather_object(found, (state(model), report.loss_after, report.changed))
    assert both < 0.75 * one
    assert report.loss_before == pytest.approx(whole.loss_before, rel=1e-6)
    assert report.loss_after < 0.7 * report.loss_before
    assert report.loss_after == pytest.approx(whole.loss_after, rel=0.15)
    assert any(not torch.equal(one, other) for one, other in zip(old, codes(model), strict=True))
    assert found[0][1:] == found[1][1:]
    assert all(torch.equal(found[0][0][name], value) for name, value in found[1][0].items())


def killed_and_resumed(rank: int, folder: Path) -> None:
    untuned, dense, data = prepared("2x2g8")
    options: dict[str, Any] = {"config": replace(PAIRS, epochs=4), "group": everyone()}
    whole = copy.deepcopy(untuned)
    tune_pv(whole, dense, data, **options)

    def stop(done: PVRound) -> None:
        if done.step == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune_pv(copy.deepcopy(untuned), dense, data, work_dir=folder / "work", on_round=stop, **options)
    dist.barrier()
    model = copy.deepcopy(untuned)
    tune_pv(model, dense, data, work_dir=folder / "work", resume=True, **options)
    assert_same(model, whole)


def uneven_shares_are_refused(rank: int, folder: Path) -> None:
    model, dense, data = prepared()
    with pytest.raises(ValueError, match="batches_per_step must be a multiple of the number of processes, 2"):
        tune_pv(model, dense, data, config=replace(QUICK, batches_per_step=3), group=everyone())
    assert any(isinstance(parameter, AQLMTensor) for parameter in model.parameters())


CASES = [both_end_alike_and_near_one, killed_and_resumed, uneven_shares_are_refused]


def test_on_two_ranks(tmp_path: Path) -> None:
    """One test, since starting the processes takes longer than each case."""
    failed = {name: found for name, found in ranks.run(CASES, tmp_path).items() if found != ranks.PASSED}
    assert not failed, json.dumps(failed, indent=1)
