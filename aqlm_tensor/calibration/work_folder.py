"""What `calibrate` keeps on disk so that a run that was killed can go on: a file per finished layer and block.

    state.json                   what the run is: settings, and fingerprints of the model and the data
    layer.<fqn>.safetensors      codes, codebooks and scales as the solver left them, and the layer's report
    block.<index>.safetensors    what fine-tuning changed: codebooks, scales, norms and biases; the block's report

Each file appears complete or not at all, on a full disk, too: what was begun of it is removed. One run at a time works
in a folder: it is locked (flock), where the file system can do that, until the process ends, however it ends.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig, config_to_dict

from aqlm_tensor.calibration.report import CalibratedLayer
from aqlm_tensor.checkpoint import PARTS
from aqlm_tensor.checkpoint_io import flush, read_json
from aqlm_tensor.tensor import AQLMTensor

__all__ = ["WorkFolder", "as_json", "continuous", "fingerprint"]

_FORMAT = 2
_STATE = "state.json"
_SUFFIX = ".safetensors"


class WorkFolder:
    """A folder of finished layers and blocks.

    Args:
        path: created if it does not exist.
        resume: whether it may hold something already.
        rank: of this process, among those that share the folder.

    Raises:
        FileExistsError: if it holds something and `resume` is False.
        ValueError: if it holds something that is no work folder, or another run is at work there.
    """

    _lock: int | None = None  # file descriptor

    def __init__(self, path: Path, *, resume: bool, rank: int = 0) -> None:
        self.path = path
        if rank > 0:  # the first one has looked
            return
        if path.exists() and any(entry.suffix != ".partial" for entry in path.iterdir()):
            if not resume:
                raise FileExistsError(f"{path} holds an earlier run: pass resume=True to go on with it, or delete it")
            if not (path / _STATE).is_file():
                raise ValueError(f"{path} is no work folder (it has no {_STATE}): choose another one")
        path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise ValueError(f"another run is at work in {path}: wait for it, or end it first") from None
        except OSError:  # a file system without locks (NFS)
            self.close()
        for left in path.glob("inputs.*"):  # of a run that was killed
            shutil.rmtree(left)

    def close(self) -> None:
        """Let others work there."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def check_same(self, settings: dict[str, Any], blocks: Sequence[nn.Module], data: str) -> None:
        """Note what this run is, or check that it is the one that the folder was begun with.

        Args:
            settings: JSON-able.
            blocks: the dense blocks.
            data: fingerprint of the calibration data.

        Raises:
            ValueError: naming what differs.
        """
        state = {
            "format": _FORMAT,
            "settings": settings,
            "model": fingerprint([parameter for block in blocks for parameter in block.parameters()]),
            "data": data,
        }
        file = self.path / _STATE
        if not file.is_file():
            self._write(file, json.dumps(state, indent=2).encode())
            return
        before, settings = read_json(file), json.loads(json.dumps(settings))
        different = [name for name in ("format", "model", "data") if before.get(name) != state[name]]
        different += _differences("settings", before.get("settings"), settings)
        if different:
            raise ValueError(
                f"{self.path} was begun with another {' and '.join(different)}: resume with the same dense model, "
                "config and batches, or choose another work_dir"
            )

    def layers(self) -> set[str]:
        """Names of the finished layers."""
        return {file.name.removeprefix("layer.").removesuffix(_SUFFIX) for file in self.path.glob(f"layer.*{_SUFFIX}")}

    def blocks(self) -> set[int]:
        """Indices of the finished blocks."""
        return {int(file.name.split(".")[1]) for file in self.path.glob(f"block.*{_SUFFIX}")}

    def save_layer(self, report: CalibratedLayer, weight: AQLMTensor) -> None:
        """Keep a finished layer."""
        self._save(self._layer(report.fqn), dict(zip(PARTS, weight.parts(), strict=True)), asdict(report))

    def load_layer(self, fqn: str, device: torch.device) -> tuple[CalibratedLayer, AQLMTensor]:
        """A finished layer."""
        tensors, report = self._load(self._layer(fqn), device)
        report["shape"] = tuple(report["shape"])
        return CalibratedLayer(**report), AQLMTensor(tensors["codes"], tensors["codebooks"], tensors["scales"])

    def save_block(self, index: int, block: nn.Module, report: Any | None) -> None:
        """Keep what fine-tuning changed in a block, with its report (a dataclass)."""
        self._save(self._block(index), continuous(block), None if report is None else asdict(report))

    @torch.no_grad()
    def load_block(self, index: int, block: nn.Module) -> dict[str, Any] | None:
        """Put into a block, whose layers are quantized, what fine-tuning changed; its report's fields."""
        targets = continuous(block)
        tensors, report = self._load(self._block(index), next(block.parameters()).device)
        for name, target in targets.items():
            target.copy_(tensors[name])
        return report

    def _layer(self, fqn: str) -> Path:
        return self.path / f"layer.{fqn}{_SUFFIX}"

    def _block(self, index: int) -> Path:
        return self.path / f"block.{index:05d}{_SUFFIX}"

    def _save(self, file: Path, tensors: dict[str, Tensor], report: dict[str, Any] | None) -> None:
        own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        self._write(file, save(own, metadata={"report": json.dumps(report)}))

    def _load(self, file: Path, device: torch.device) -> tuple[dict[str, Tensor], Any]:
        with safe_open(file, framework="pt", device=str(device)) as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
            return tensors, json.loads(opened.metadata()["report"])

    def _write(self, file: Path, content: bytes) -> None:
        temporary = file.with_suffix(".partial")
        try:
            temporary.write_bytes(content)
            flush(temporary)
            os.replace(temporary, file)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            if isinstance(error, OSError):
                error.filename = error.filename or str(file)  # a failed write does not say where
            raise
        flush(self.path)


def _differences(name: str, before: Any, now: Any) -> list[str]:
    """Where two JSON values differ, and how."""
    if before == now:
        return []
    if not isinstance(before, dict) or not isinstance(now, dict):
        return [f"{name} (then {json.dumps(before)}, now {json.dumps(now)})"]
    keys = sorted({*before, *now})
    return [
        found
        for key in keys
        for found in _differences(name if key == "_data" else f"{name}.{key}", before.get(key), now.get(key))
    ]


def continuous(block: nn.Module) -> dict[str, Tensor]:
    """What fine-tuning may change in a block, by name."""
    found: dict[str, Tensor] = {}
    for name, parameter in block.named_parameters():
        if isinstance(parameter, AQLMTensor):
            found |= {f"{name}.codebooks": parameter.codebooks, f"{name}.scales": parameter.scales}
        elif parameter.dim() == 1:
            found[name] = parameter
    return found


def as_json(value: Any) -> Any:
    """A config, dataclass or plain value in JSON's terms."""
    if isinstance(value, AOBaseConfig):
        return config_to_dict(value)
    plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    return json.loads(json.dumps(plain, default=str))


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """A hash of shapes, dtypes and values."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
