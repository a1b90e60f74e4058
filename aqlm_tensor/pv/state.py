"""What `tune_pv` keeps on disk so that a run that was killed can go on: one file, replaced as a whole.

tuning.safetensors    trained parameters, Adam's moments, codes, the best of both so far; as metadata what the run
                      is (settings, fingerprints of model and data) and how far it is
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from aqlm_tensor.checkpoint_io import flush
from aqlm_tensor.tensor import AQLMTensor

__all__ = ["TuningFolder", "model_tensors"]

_FILE = "tuning.safetensors"


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

    def save(self, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
        """Replace the state by this one; a kill leaves either."""
        own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        state = json.dumps({"identity": self._identity, "progress": progress})
        save_file(own, self._partial, metadata={"state": state})
        flush(self._partial)
        os.replace(self._partial, self._file)
        flush(self._file.parent)

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> dict[str, Any] | None:
        """Copy the saved state into tensors of the same names; how far it was. None if nothing was saved yet."""
        if not self._file.is_file():
            return None
        with safe_open(self._file, framework="pt") as opened:
            for name, tensor in tensors.items():
                tensor.copy_(opened.get_tensor(name))
        return self._metadata()["progress"]


def model_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Every parameter and buffer of a model, AQLM weights as their three tensors."""
    for tensor in (*model.parameters(), *model.buffers()):
        yield from tensor.parts() if isinstance(tensor, AQLMTensor) else (tensor,)
