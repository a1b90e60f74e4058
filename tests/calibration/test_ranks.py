"""calibrate on two ranks: each solves a share of the layers, and both end with the bits of one process."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed import ProcessGroup

from aqlm_tensor import calibrate, handler
from aqlm_tensor.calibration import experts
from aqlm_tensor.ranks import Ranks
from tests import ranks
from tests.calibration.test_block_calls import token_ids
from tests.calibration.test_calibrate import TUNING, assert_same, model_and_data
from tests.calibration.test_experts import mixtral
from tests.models import config


def everyone() -> ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def counted(module: Any) -> list[int]:
    """Counts the layers that this process solves from now on."""
    solve, calls = module.quantize_layer, []

    def count(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return solve(*args, **kwargs)

    module.quantize_layer = count
    return calls


def layers_are_shared(rank: int, folder: Path) -> None:
    dense, data = model_and_data()
    one, both = copy.deepcopy(dense), copy.deepcopy(dense)
    alone = calibrate(one, config(), data, finetune=TUNING)
    calls = counted(handler)
    together = calibrate(both, config(), data, finetune=TUNING, group=everyone())
    assert len(calls) == 3
    assert_same(one, both)
    assert [layer.fqn for layer in together.layers] == [layer.fqn for layer in alone.layers]
    assert [layer.relative_error for layer in together.layers] == [layer.relative_error for layer in alone.layers]
    assert [block.error_after for block in together.blocks] == [block.error_after for block in alone.blocks]


def experts_are_shared(rank: int, folder: Path) -> None:
    one, data = mixtral(), token_ids()
    both = copy.deepcopy(one)
    calibrate(one, config("1x4g4"), data, true_sequential=True)
    calls = counted(experts)
    calibrate(both, config("1x4g4"), data, true_sequential=True, group=everyone())
    assert len(calls) == 2 * 2 * (2 + 1)  # blocks, experts of each rank, gate and up and down
    assert_same(one, both)


def killed_together_and_resumed_alone(rank: int, folder: Path) -> None:
    dense, data = model_and_data()

    def stop(progress: Any) -> None:
        if (progress.block, progress.phase) == (1, "fine-tune"):
            raise RuntimeError("killed")

    options: dict[str, Any] = {"finetune": TUNING, "work_dir": folder, "group": everyone()}
    with pytest.raises(RuntimeError, match="killed"):
        calibrate(copy.deepcopy(dense), config(), data, on_progress=stop, **options)
    dist.barrier()
    assert len(list(folder.glob("layer.*"))) == 4
    again, alone = copy.deepcopy(dense), copy.deepcopy(dense)
    report = calibrate(again, config(), data, resume=True, **options)
    assert report.run is not None
    assert report.run.resumed
    dist.barrier()
    calibrate(alone, config(), data, finetune=TUNING, work_dir=folder, resume=True)
    assert_same(again, alone)


CASES = [layers_are_shared, experts_are_shared, killed_together_and_resumed_alone]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return ranks.run(CASES, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_on_two_ranks(case: Any, outcomes: dict[str, list[str]]) -> None:
    assert outcomes[case.__name__] == ranks.PASSED, json.dumps(outcomes[case.__name__], indent=1)


def test_owners_share_the_work_evenly() -> None:
    alone = Ranks()
    assert alone.owners([3, 1, 2]) == [0, 0, 0]
    assert alone.shared("value", 0) == "value"
    alone.size = 3
    llama = [16, 16, 16, 16, 45, 45, 45]
    owners = alone.owners(llama)
    loads = [sum(size for size, owner in zip(llama, owners, strict=True) if owner == rank) for rank in range(3)]
    assert sorted(loads) == [61, 61, 77]
