"""Activations: what one block gets, or puts out, for every batch, kept on the device, in CPU memory or on disk.

A calibration set of 128 windows of 1024 tokens is 1 GB for a width of 4096 in bfloat16, and a block needs it twice to
three times (inputs, outputs, targets of fine-tuning). The device is fastest; the disk costs a read and a write of each.
"""

import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save
from torch import Tensor

__all__ = ["PLACES", "Activations", "Place"]

Place = Literal["device", "cpu", "disk"]
PLACES: tuple[Place, ...] = ("device", "cpu", "disk")


class Activations(Sequence[Tensor]):
    """Tensors of any shapes by number of the batch; they come back on the device, with the values they went in with.

    Args:
        place: "device", "cpu", or "disk" (a folder of its own that goes with this object).
        device: where tensors are wanted.
        folder: where to make the folder; None takes the system's place for temporary files.
    """

    def __init__(self, place: Place, device: torch.device, folder: Path | None = None) -> None:
        self.place, self.device = place, device
        self._kept: list[Tensor | Path] = []
        self._folder = Path(tempfile.mkdtemp(prefix="inputs.", dir=folder)) if place == "disk" else None
        if self._folder is not None:
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def append(self, tensor: Tensor) -> None:
        """Keep the tensor of the next batch."""
        if self._folder is None:
            self._kept.append(tensor.to(self.device if self.place == "device" else "cpu"))
            return
        file = self._folder / f"{len(self)}.safetensors"
        file.write_bytes(save({"x": tensor.detach().cpu().contiguous()}))
        self._kept.append(file)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: Any) -> Any:
        kept = self._kept[index]
        tensor = load_file(kept)["x"] if isinstance(kept, Path) else kept
        return tensor.to(self.device)
