"""calibrate on two ranks: each has a share of the batches and the layers, and both end with the bits of one process."""

import copy
import datetime as dt
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.multiprocessing.spawn import start_processes

from aqlm_tensor import FinetuneConfig, calibrate, handler
from aqlm_tensor.calibration import experts
from aqlm_tensor.calibration.block_calls import BlockCalls
from aqlm_tensor.ranks import Ranks
from tests import ranks
from tests.calibration.test_block_calls import token_ids
from tests.calibration.test_calibrate import TUNING, assert_same, model_and_data, state
from tests.calibration.test_experts import mixtral
from tests.models import config


def everyone() -> ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def counted(owner: Any, name: str = "quantize_layer") -> list[int]:
    """Counts the calls of a function of a module or class from now on."""
    function, calls = getattr(owner, name), []

    def count(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return function(*args, **kwargs)

    setattr(owner, name, count)
    return calls


def work_is_shared(rank: int, folder: Path) -> None:
    dense, data = model_and_data()
    del data[5:]  # an uneven number
    tuning = FinetuneConfig(epochs=3, lr=3e-3, batches_per_step=2)
    one, both = copy.deepcopy(dense), copy.deepcopy(dense)
    passes, solved = counted(BlockCalls, "run"), counted(handler)
    alone = calibrate(one, config(), data, finetune=tuning)
    counts = len(passes), len(solved)
    together = calibrate(both, config(), data, finetune=tuning, group=everyone())
    assert len(solved) - counts[1] == 3
    assert counts[1] == 6
    assert len(passes) - counts[0] <= 0.7 * counts[0]
    assert_same(one, both)
    assert [layer.tokens for layer in together.layers] == [layer.tokens for layer in alone.layers]
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


class Routed(nn.Module):
    """Sends long inputs to one expert and short ones to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.ModuleDict({"gate": nn.Linear(32, 64), "up": nn.Linear(32, 64), "down": nn.Linear(64, 32)})
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        expert: Any = self.experts[x.shape[1] % 2]
        return x + expert["down"](expert["gate"](x).sigmoid() * expert["up"](x))


def experts_that_one_rank_never_calls(rank: int, folder: Path) -> None:
    one = nn.Sequential(nn.Embedding(50, 32), nn.Sequential(*(Routed() for _ in range(2))))
    data = [torch.randint(50, (2, 16 + number % 2)) for number in range(5)]
    both = copy.deepcopy(one)
    alone = calibrate(one, config("2x3g8"), data)
    together = calibrate(both, config("2x3g8"), data, group=everyone())
    assert_same(one, both)
    assert {layer.tokens for layer in together.layers} == {3 * 32, 2 * 34} == {layer.tokens for layer in alone.layers}


def tensors_are_exchanged(rank: int, folder: Path) -> None:
    both = Ranks(everyone())
    for dtype in (torch.int16, torch.int8, torch.bfloat16, torch.float64):
        tensor = torch.full((2, 3), 1 + rank, dtype=dtype)
        both.like_first([tensor, tensor.T])
        assert torch.equal(tensor, torch.ones(2, 3, dtype=dtype))
    number, matrix = torch.tensor(1.0 + rank), torch.full((2, 3), float(rank))
    both.add_up_together([number, matrix])
    assert (float(number), float(matrix.sum())) == (3.0, 6.0)
    assert both.together({rank: "a" * rank}) == {0: "", 1: "a"}


def too_few_batches(rank: int, folder: Path) -> None:
    dense, data = model_and_data()
    with pytest.raises(ValueError, match="1 batches cannot be divided over 2 processes"):
        calibrate(dense, config(), data[:1], group=everyone())


def different_batches(rank: int, folder: Path) -> None:
    dense, data = model_and_data()
    with pytest.raises(ValueError, match="different settings or batches"):
        calibrate(dense, config(), data[rank:4], group=everyone())


def a_failure_of_the_first_reaches_all(rank: int, folder: Path) -> None:
    dense, data = model_and_data()
    (folder / "something").touch()
    dist.barrier()
    expected = (FileExistsError, "earlier run") if rank == 0 else (RuntimeError, "first process failed.*earlier run")
    with pytest.raises(expected[0], match=expected[1]):
        calibrate(dense, config(), data, group=everyone(), work_dir=folder)


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
    if rank == 0:  # one run at a time works in a folder
        calibrate(alone, config(), data, finetune=TUNING, work_dir=folder, resume=True)
        assert_same(again, alone)


CASES = [
    work_is_shared,
    experts_are_shared,
    experts_that_one_rank_never_calls,
    tensors_are_exchanged,
    too_few_batches,
    different_batches,
    a_failure_of_the_first_reaches_all,
    killed_together_and_resumed_alone,
]


def test_on_two_ranks(tmp_path: Path) -> None:
    """One test, since starting the processes takes longer than each case."""
    failed = {name: found for name, found in ranks.run(CASES, tmp_path).items() if found != ranks.PASSED}
    assert not failed, json.dumps(failed, indent=1)


def test_owners_share_the_work_evenly() -> None:
    alone = Ranks()
    assert alone.owners([3, 1, 2]) == [0, 0, 0]
    assert alone.shared("value", 0) == "value"
    alone.size = 3
    llama = [16, 16, 16, 16, 45, 45, 45]
    owners = alone.owners(llama)
    loads = [sum(size for size, owner in zip(llama, owners, strict=True) if owner == rank) for rank in range(3)]
    assert sorted(loads) == [61, 61, 77]


def one_rank(rank: int, folder: Path, attempt: int) -> None:
    """A process that is killed on its way, or leaves the result in the folder."""
    torch.set_num_threads(1)
    store = f"file://{folder / f'store{attempt}'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=dt.timedelta(seconds=60))
    model, data = model_and_data()
    calibrate(
        model,
        config(),
        data,
        finetune=FinetuneConfig(epochs=3, lr=3e-3, batches_per_step=2),
        work_dir=folder / "work",
        resume=attempt > 0,
        group=everyone(),
        on_progress=lambda _: time.sleep(0.02),
    )
    torch.save(state(model), folder / f"result{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def kill_and_resume(folder: Path, kills: int) -> None:
    """Start both ranks and kill them so many times; runs that end in time are followed by another."""
    choose, killed, runs = random.Random(0), 0, 0
    while killed < kills:
        here, attempt = folder / str(runs), 0
        here.mkdir()
        while True:
            processes: Any = start_processes(one_rank, (here, attempt), nprocs=2, join=False, start_method="fork")
            time.sleep(choose.uniform(0.1, 1.2))
            attempt += 1
            if killed == kills or all(not process.is_alive() for process in processes.processes):
                break
            for process in processes.processes:
                os.kill(process.pid, signal.SIGKILL)
                process.join()
            killed += 1
        processes.join(60)
        runs += 1


@pytest.mark.full
def test_two_processes_killed_and_resumed_twenty_times_end_with_the_bits_of_one(tmp_path: Path) -> None:
    program = (
        f"import sys; sys.path.append({str(ranks.ROOT)!r}); from pathlib import Path; "
        f"from tests.calibration.test_ranks import kill_and_resume; kill_and_resume(Path({str(tmp_path)!r}), 20)"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run([sys.executable, "-P", "-W", "ignore", "-c", program], env=environment, check=True, timeout=300)
    model, data = model_and_data()
    calibrate(model, config(), data, finetune=FinetuneConfig(epochs=3, lr=3e-3, batches_per_step=2))
    expected = state(model)
    results = list(tmp_path.glob("*/result?.pt"))
    assert len(results) >= 2
    for file in results:
        found = torch.load(file)
        assert all(torch.equal(found[name], value) for name, value in expected.items())
