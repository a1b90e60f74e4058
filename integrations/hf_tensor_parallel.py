"""Tensor parallelism of Transformers (`tp_plan="auto"`) with AQLM weights: each rank holds a part of a layer's codes.

Transformers makes DTensors of the parameters before it loads them, and cuts every tensor that belongs to one as if it
were the dense weight. Codebooks must not be cut, so quantized parameters are taken out of its sight: they become plain
ones of the local shape, each rank reads the three tensors, and keeps its part. From then on Transformers runs such a
layer on local tensors, as it does for other quantized layers; saving joins the parts again.

Linear layers split by outputs (colwise) or by inputs (rowwise), in equal parts that end where groups end.
"""

import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from transformers.core_model_loading import ConversionOps, WeightTransform

from aqlm_tensor.checkpoint import PARTS, stored_weights
from aqlm_tensor.checkpoint_io import TensorFiles
from aqlm_tensor.integrations.hf_checkpoint import homes_of
from aqlm_tensor.scheme import AQLMScheme
from aqlm_tensor.tensor import AQLMTensor

__all__ = ["KeepPart", "TensorParallel"]


class TensorParallel:
    """Which weights of a model are split over ranks, and how."""

    def __init__(self) -> None:
        self._schemes: dict[str, AQLMScheme | None] = {}  # by parameter; None where several stored weights are joined
        self._split: dict[str, tuple[DeviceMesh, Shard]] = {}
        self._hook: Any = None

    def __deepcopy__(self, memo: dict) -> "TensorParallel":
        """The loader copies a converter for each weight; all copies look here."""
        return self

    def prepare(self, model: Any, files: Sequence[str], transforms: list[WeightTransform]) -> None:
        """Before Transformers distributes a model: see to it that its loader then finds plain parameters.

        Args:
            model: on the meta device.
            files: of the checkpoint.
            transforms: with which Transformers will load it.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return
        weights = {name: info for name, info in stored_weights(TensorFiles(Path(), files)).items() if info.scheme}
        codes = {f"{name.removesuffix('.weight')}.{PARTS[0]}": info.scheme for name, info in weights.items()}
        homes = homes_of(model, list(codes), transforms)
        uses = Counter(target for targets in homes.values() for target in targets)
        for key, targets in homes.items():
            alone = len(targets) == 1 and uses[targets[0]] == 1
            self._schemes |= dict.fromkeys(targets, codes[key] if alone else None)
        self._hook = model.register_state_dict_post_hook(partial(self._hide))  # to which torch sets an attribute

    def _hide(self, model: Any, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        """What the loader sees: quantized DTensors become plain parameters of their local shape."""
        for name in self._schemes.keys() & state.keys():
            weight = state[name]
            if isinstance(weight, DTensor):
                module = model.get_submodule(name.rpartition(".")[0])
                self._split[name] = weight.device_mesh, _placement(name, module, weight, self._schemes[name])
                state[name] = torch.empty_like(weight.to_local())
                module.weight = nn.Parameter(state[name], requires_grad=False)

    def finish(self, model: Any) -> None:
        """After loading: let split layers run on their local weights."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        for name in self._split:
            model.get_submodule(name.rpartition(".")[0])._hf_quantized_needs_local_tp = True

    def part(self, name: str, weight: AQLMTensor) -> AQLMTensor:
        """This rank's part of a weight, in memory of its own; the weight itself if it is not split."""
        if name not in self._split:
            return weight
        mesh, placement = self._split[name]
        part: Any = weight.chunk(mesh.size(), placement.dim)[mesh.get_local_rank()]
        return AQLMTensor(part.codes.clone(), part.codebooks, part.scales.clone())

    def whole(self, name: str, weight: AQLMTensor) -> AQLMTensor:
        """The weight of which this rank holds a part; every rank must ask for it."""
        if name not in self._split:
            return weight
        mesh, placement = self._split[name]
        joined: Any = DTensor.from_local(weight, mesh, [placement], run_check=False).full_tensor()
        return joined


class KeepPart(ConversionOps):
    """The parameter that was read to the part of it that this rank keeps."""

    def __init__(self, parallel: TensorParallel) -> None:
        self.parallel = parallel

    @torch.no_grad()
    def convert(  # pyright: ignore[reportIncompatibleMethodOverride] - the keywords that the loader passes
        self, input_dict: dict[str, Any], **kwargs: Any
    ) -> dict[str, Any]:
        """Called by Transformers."""
        return {
            name: nn.Parameter(self.parallel.part(name, weight), requires_grad=False)
            for name, weight in input_dict.items()
        }


def _placement(name: str, module: nn.Module, weight: DTensor, scheme: AQLMScheme | None) -> Shard:
    """How a weight is split.

    Raises:
        ValueError: if AQLM weights cannot be split that way.
    """
    mesh, placements = weight.device_mesh, weight.placements
    if not isinstance(module, nn.Linear) or scheme is None or mesh.ndim != 1 or not isinstance(placements[0], Shard):
        layer, _, weight_name = re.sub(r"\.\d+\.", ".*.", name).rpartition(".")
        whole = dict.fromkeys([layer] if weight_name == "weight" else [layer, f"{layer}.{weight_name}"], "replicate")
        raise ValueError(
            f"{name} of a {type(module).__name__} would be distributed as {list(placements)}, but AQLM weights "
            "only as colwise or rowwise parts of a linear layer on a mesh of one dimension: keep it and the other "
            f"weights of its block whole by DistributedConfig(tp_plan={whole}), or for FSDP2 load without a plan and "
            "call fully_shard afterwards"
        )
    dim, count = placements[0].dim % 2, mesh.size()
    group = (scheme.out_group_size, scheme.in_group_size)[dim]
    if weight.shape[dim] % (count * group):
        raise ValueError(
            f"{name} {tuple(weight.shape)} cannot be split into {count} equal parts along dimension {dim}, since "
            f"{scheme} needs parts of whole groups of {group}: use another number of ranks, or give all layers of its "
            'block the style "replicate" in the tp_plan'
        )
    return Shard(dim)
