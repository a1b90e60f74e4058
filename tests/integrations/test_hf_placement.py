"""Where weights lie: sizes for device maps, offloading with accelerate, and what is refused."""

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import nn
from transformers.integrations.accelerate import compute_module_sizes

import aqlm_tensor.integrations.hf  # noqa: F401 - registers
from aqlm_tensor import AQLMTensor
from tests.models import config
from tests.tensor.weights import random_weight

from .official import FAMILIES, Pair, logits_of, write_pair

MAIN: Any = "cpu"  # accelerate compares its main device with strings


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair(tmp_path_factory.mktemp("llama"), FAMILIES["llama"], "2x4g8")


def load(folder: Path, **options: Any) -> Any:
    return FAMILIES["llama"].auto.from_pretrained(folder, **options)


def on_disk(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_size


def test_a_device_map_is_planned_with_the_size_of_codes(llama: Pair) -> None:
    """A limit between the stored and the dense size is enough; less leads to the disk, which is refused."""
    assert on_disk(llama.aqlm) < 180_000 < on_disk(llama.dense)
    model = load(llama.aqlm, device_map="auto", max_memory={"cpu": 180_000})
    assert torch.equal(logits_of(model), logits_of(load(llama.aqlm)))
    with pytest.raises(ValueError, match="cannot be offloaded to disk"):
        load(llama.aqlm, device_map="auto", max_memory={"cpu": 60_000})


def test_sizes_on_the_fly(llama: Pair) -> None:
    with pytest.raises(ValueError, match="cannot be offloaded to disk"):
        load(llama.dense, device_map="auto", max_memory={"cpu": 60_000}, quantization_config=config("2x4g8"))
    model = load(
        llama.dense, device_map="auto", max_memory={"cpu": 180_000}, quantization_config=config("2x4g8")
    )  # fmt: skip
    assert model.get_memory_footprint() < 180_000


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_element_sizes_add_up_to_what_is_stored(name: str, tmp_path: Path) -> None:
    pair = write_pair(tmp_path, FAMILIES[name])
    model = FAMILIES[name].auto.from_pretrained(pair.aqlm)
    sizes, _ = compute_module_sizes(model, model.hf_quantizer)
    assert sizes[""] == pytest.approx(model.get_memory_footprint(), rel=1e-6)


def test_disk_offload_is_refused(llama: Pair) -> None:
    devices: dict[str, Any] = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": 0}
    with pytest.raises(ValueError, match=r"cannot be offloaded to disk.*model\.layers.*max_memory"):
        load(llama.aqlm, device_map=devices)


def test_a_device_map_of_one_device(llama: Pair) -> None:
    for devices in ("cpu", {"": "cpu"}, torch.device("cpu")):
        assert torch.equal(logits_of(load(llama.aqlm, device_map=devices)), logits_of(load(llama.aqlm)))


def test_accelerate_does_not_confuse_tied_weights() -> None:
    """It tells weights by address, and the address of a wrapper is 0: one tied pair made all weights the same."""
    model: Any = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4)))
    for index, layer in enumerate(model):
        layer.weight = nn.Parameter(random_weight("2x4g8", 64, 64, seed=index), requires_grad=False)
    model[1].weight = model[0].weight
    x = torch.randn(2, 64)
    expected = model(x)
    accelerate.dispatch_model(model, {"": "cpu"}, main_device=MAIN, force_hooks=True)
    torch.testing.assert_close(model(x), expected)


def test_accelerate_keeps_dense_ties(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, FAMILIES["qwen2"])
    model = FAMILIES["qwen2"].auto.from_pretrained(pair.aqlm)
    expected = logits_of(model)
    assert accelerate.big_modeling.find_tied_parameters(model) == [["lm_head.weight", "model.embed_tokens.weight"]]
    accelerate.dispatch_model(model, {"": "cpu"}, main_device=MAIN, force_hooks=True)
    assert torch.equal(logits_of(model), expected)


def test_a_parameter_is_rebuilt_by_its_class() -> None:
    """As accelerate does with a weight that it moved."""
    weight = random_weight()
    parameter = AQLMTensor(weight, requires_grad=False)
    assert isinstance(parameter, nn.Parameter)
    assert isinstance(parameter, AQLMTensor)
    assert parameter.codes.data_ptr() == weight.codes.data_ptr()
    with pytest.raises(RuntimeError, match="trainable"):
        AQLMTensor(weight, requires_grad=True)
    with pytest.raises(TypeError, match="codebooks must be a torch.Tensor, got NoneType"):
        AQLMTensor(weight.codes)


def test_models_move_and_cast(llama: Pair) -> None:
    model = load(llama.aqlm)
    expected = logits_of(model)
    half = model.to(torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert float((logits_of(half).float() - expected).norm() / expected.norm()) < 6e-2
    meta = half.to("meta")
    assert all(
        part.is_meta for weight in meta.parameters() if isinstance(weight, AQLMTensor) for part in weight.parts()
    )
