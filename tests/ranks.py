"""Functions run by two processes that can talk to each other, on the CPU or a GPU each: what is distributed."""

import datetime as dt
import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

__all__ = ["PASSED", "device", "run", "tests_of"]

ROOT = Path(__file__).parents[1]
PASSED = ["passed", "passed"]

_EACH_DEVICE = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")],
    ),
]


def device() -> torch.device:
    """This rank's device."""
    return torch.device("cpu") if dist.get_backend() == "gloo" else torch.device("cuda", dist.get_rank())


def tests_of(cases: Sequence[Callable[[int, Path], None]]) -> tuple[Callable, Callable]:
    """A fixture and a test, to be called `outcomes` and `test_on_two_ranks` by a module that has the functions.

    Each function is a test of its own; all are run at once, on the CPU and, if there are two, on GPUs.
    """

    @pytest.fixture(scope="module", params=_EACH_DEVICE)
    def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
        return run(cases, tmp_path_factory.mktemp("ranks"), device=request.param)

    @pytest.mark.parametrize("case", [case.__name__ for case in cases])
    def test_on_two_ranks(case: str, outcomes: dict[str, list[str]]) -> None:
        assert outcomes[case] == PASSED, "\n".join(outcomes[case])

    return outcomes, test_on_two_ranks


def run(
    cases: Sequence[Callable[[int, Path], None]], folder: Path, timeout: float = 400, device: str = "cpu"
) -> dict[str, list[str]]:
    """Run functions of one module one after another, each on both ranks.

    Args:
        cases: module-level functions; they get the rank, and a folder that both ranks share.
        folder: an empty one.
        timeout: in seconds, for all of them.
        device: "cpu" (by gloo) or "cuda" (by NCCL, each rank on a GPU of its own, which is its current one).

    Returns:
        For each function's name what became of it on each rank: "passed", or the traceback.
    """
    program = f"import sys; sys.path.append({str(ROOT)!r}); from tests import ranks; ranks.main(*sys.argv[1:])"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    arguments = [cases[0].__module__, str(folder), device, *(case.__name__ for case in cases)]
    command = [sys.executable, "-P", "-W", "ignore", "-c", program, *arguments]
    subprocess.run(command, env=environment, check=True, timeout=timeout)
    reports = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    return {case.__name__: [report.get(case.__name__, "not run") for report in reports] for case in cases}


def main(module: str, folder: str, device: str, *cases: str) -> None:
    """The process that imports everything once and becomes two; CUDA survives no fork, so there it starts two."""
    importlib.import_module(module)
    method = "spawn" if device == "cuda" else "fork"
    start_processes(_rank, (module, Path(folder), device, cases), nprocs=2, start_method=method)


def _rank(rank: int, module: str, folder: Path, device: str, cases: Sequence[str]) -> None:
    importlib.import_module(module)
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    backend = "gloo"
    if device == "cuda":
        torch.cuda.set_device(rank)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(
        backend, init_method=f"file://{folder / 'store'}", rank=rank, world_size=2, timeout=dt.timedelta(seconds=30)
    )
    outcomes: dict[str, str] = {}
    for name in cases:
        shared = folder / name
        shared.mkdir(exist_ok=True)
        torch.manual_seed(0)
        try:
            getattr(sys.modules[module], name)(rank, shared)
            outcomes[name] = "passed"
        except Exception:  # noqa: BLE001 - reported by the test of that name
            outcomes[name] = traceback.format_exc()
        (folder / f"rank{rank}.json").write_text(json.dumps(outcomes))
        dist.barrier()
    dist.destroy_process_group()
