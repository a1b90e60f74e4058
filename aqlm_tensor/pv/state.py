"""What `tune_pv` keeps on disk so that a run that was killed can go on: one file, replaced as a whole.

tuning.safetensors    trained parameters, Adam's moments, codes, the best of both so far; as metadata what the run
                      is (settings, fingerprints of model and data) and how far it is
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from aqlm_tensor.checkpoint_io import flush, write_file
from aqlm_tensor.pv.rows import Rows
from aqlm_tensor.ranks import Ranks
from aqlm_tensor.tensor import AQLMTensor

__all__ = ["Saved", "TuningFolder", "model_tensors"]

_FILE = "tuning.safetensors"


class Saved(NamedTuple):
    """A tensor that is saved and loaded.

    Attributes:
        tensor: this rank's rows of it.
        rows: which these are.
        length: rows of all ranks.
    """

    tensor: Tensor
    rows: Rows
    length: int


class TuningFolder:
    """A folder with the state of one run of `tune_pv`.

    Args:
        path: created if it does not exist.
        identity: what the run is; JSON-able.
        resume: whether it may hold something already.

    Raises:
        FileExistsError: if it holds something and `resume` is False.
        ValueError: if it holds something that is no state, or that of another run, naming what differs.
    """

    def __init__(self, path: Path, identity: dict[str, Any], *, resume: bool) -> None:
        self._file = path / _FILE
        self._identity = identity
        if path.exists() and any(path.iterdir()):
            if not resume:
                raise FileExistsError(f"{path} holds an earlier run: pass resume=True to go on with it, or delete it")
            if not self._file.is_file() and not self._partial.is_file():
                raise ValueError(f"{path} is no folder of a tuning run (it has no {_FILE}): choose another one")
        if self._file.is_file():
            before = self._metadata()["identity"]
            different = [name for name in identity if before.get(name) != json.loads(json.dumps(identity[name]))]
            if different:
                raise ValueError(
                    f"{path} was begun with another {' and '.join(different)}: resume with the same model, config, "
                    "teacher and batches, or choose another work_dir"
                )
        path.mkdir(parents=True, exist_ok=True)

    @property
    def _partial(self) -> Path:
        return self._file.with_suffix(".partial")

    def _metadata(self) -> dict[str, Any]:
        with safe_open(self._file, framework="pt") as opened:
            return json.loads(opened.metadata()["state"])

    def save(self, tensors: Mapping[str, Saved], progress: dict[str, Any], ranks: Ranks) -> None:
        """Replace the state by this one; a kill leaves either. All ranks have to call this, and the first one writes.

        Of sharded tensors one at a time is gathered; the first rank has all of them in CPU memory.
        """
        whole: dict[str, Tensor] = {}
        for name, (tensor, rows, length) in tensors.items():
            found = rows.whole(tensor.detach(), length)
            if ranks.rank == 0:
                whole[name] = found.cpu().contiguous().clone()
        if ranks.rank > 0:
            return
        state = json.dumps({"identity": self._identity, "progress": progress})
        write_file(whole, self._partial, {"state": state})
        flush(self._partial)
        os.replace(self._partial, self._file)
        flush(self._file.parent)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Saved]) -> dict[str, Any] | None:
        """Copy the saved state into tensors of the same names; how far it was. None if nothing was saved yet."""
        if not self._file.is_file():
            return None
        with safe_open(self._file, framework="pt") as opened:
            for name, (tensor, rows, length) in tensors.items():
                part = rows.of(length)
                tensor.copy_(opened.get_slice(name)[part.start : part.stop])
        return self._metadata()["progress"]


def model_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Every parameter and buffer of a model, AQLM weights as their three tensors; sharded ones whole, one at a time."""
    for tensor in (*model.parameters(), *model.buffers()):
        whole: Any = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        yield from whole.parts() if isinstance(whole, AQLMTensor) else (whole,)
