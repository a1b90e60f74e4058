"""accelerate's own functions, on models that are loaded already."""

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import nn

from aqlm_tensor import AQLMTensor
from aqlm_tensor.linear import set_quantized
from tests.tensor.weights import random_weight

X = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))


def model() -> Any:
    layers = [nn.Linear(64, 64), nn.Linear(64, 64)]
    for seed, layer in enumerate(layers):
        set_quantized([layer], random_weight("2x4g8", 64, 64, seed=seed))
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def test_offload_to_the_cpu() -> None:
    expected = model()(X)
    offloaded: Any = accelerate.cpu_offload(model(), execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in offloaded.parameters()} == {"meta"}
    for _ in range(2):
        assert torch.equal(offloaded(X), expected)
    dispatched: Any = accelerate.dispatch_model(
        model(), {"0": "cpu", "1": "cpu"}, main_device=torch.device("cpu"), force_hooks=True
    )
    assert torch.equal(dispatched(X), expected)
    assert all(isinstance(layer.weight, AQLMTensor) for layer in offloaded.children())
    hooked, hook = accelerate.cpu_offload_with_hook(model(), execution_device="cpu")
    assert torch.equal(hooked(X), expected)
    hook.offload()


def test_disk_offload_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match='offload AQLM weights to "cpu"'):
        accelerate.disk_offload(model(), tmp_path, execution_device=torch.device("cpu"))
    with pytest.raises(TypeError, match='offload AQLM weights to "cpu"'):
        accelerate.dispatch_model(
            model(), {"0": "cpu", "1": "disk"}, main_device=torch.device("cpu"), offload_dir=tmp_path
        )
