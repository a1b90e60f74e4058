"""Functions run by two processes that can talk to each other (gloo, on the CPU), as tests of what is distributed."""

import datetime as dt
import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

__all__ = ["PASSED", "run"]

ROOT = Path(__file__).parents[1]
PASSED = ["passed", "passed"]


def run(cases: Sequence[Callable[[int, Path], None]], folder: Path, timeout: float = 240) -> dict[str, list[str]]:
    """Run functions of one module one after another, each on both ranks.

    Args:
        cases: module-level functions; they get the rank, and a folder that both ranks share.
        folder: an empty one.
        timeout: in seconds, for all of them.

    Returns:
        For each function's name what became of it on each rank: "passed", or the traceback.
    """
    program = f"import sys; sys.path.append({str(ROOT)!r}); from tests import ranks; ranks.main(*sys.argv[1:])"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    arguments = [cases[0].__module__, str(folder), *(case.__name__ for case in cases)]
    command = [sys.executable, "-P", "-W", "ignore", "-c", program, *arguments]
    subprocess.run(command, env=environment, check=True, timeout=timeout)
    reports = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    return {case.__name__: [report.get(case.__name__, "not run") for report in reports] for case in cases}


def main(module: str, folder: str, *cases: str) -> None:
    """The process that imports everything once and becomes two."""
    importlib.import_module(module)
    start_processes(_rank, (module, Path(folder), cases), nprocs=2, start_method="fork")


def _rank(rank: int, module: str, folder: Path, cases: Sequence[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2, timeout=dt.timedelta(seconds=30)
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
