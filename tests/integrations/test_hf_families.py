"""The conformance table: every family of models loads, computes, generates, saves, compiles and offloads as it should.

Two families run always; the rest with `make test-full`.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from safetensors.torch import load_file

import aqlm_tensor.integrations.hf  # noqa: F401 - registers
from aqlm_tensor import AQLMTensor

from .official import FAMILIES, Pair, logits_of, write_pair

QUICK = ("llama", "mixtral")
PARAMETERS = [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in FAMILIES]
SCHEMES = {"phi3": "1x8g8", "gemma": "2x4g16"}


@pytest.fixture(scope="module", params=PARAMETERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def pair(name: str, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair(tmp_path_factory.mktemp(name), FAMILIES[name], SCHEMES.get(name, "2x8g8"))


@pytest.fixture(scope="module")
def dense(name: str, pair: Pair) -> Any:
    return FAMILIES[name].auto.from_pretrained(pair.dense)


@pytest.fixture
def model(name: str, pair: Pair) -> Any:
    return FAMILIES[name].auto.from_pretrained(pair.aqlm, dtype="auto")


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_same_logits(model: Callable, dense: Any) -> None:
    ours, theirs = logits_of(model), logits_of(dense)
    assert bool(ours.isfinite().all())
    assert float((ours - theirs).norm() / theirs.norm()) < 2e-6


def assert_same_files(a: Path, b: Path) -> None:
    left, right = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert left.keys() == right.keys()
    for key, tensor in left.items():
        assert tensor.dtype == right[key].dtype, key
        assert torch.equal(tensor, right[key]), key


def section_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def test_load(model: Any, dense: Any, pair: Pair) -> None:
    weights = [parameter for parameter in model.parameters() if isinstance(parameter, AQLMTensor)]
    assert sum(weight.shape[0] * weight.partitions if weight.dim() == 3 else 1 for weight in weights) == len(
        pair.quantized
    )
    assert {type(module) for module in model.modules()} == {type(module) for module in dense.modules()}
    assert_same_logits(model, dense)


def test_generate(name: str, model: Any, dense: Any) -> None:
    if not FAMILIES[name].generates:
        pytest.skip("an encoder does not generate")
    tokens = torch.arange(3, 13).view(2, 5)
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(tokens, **options), dense.generate(tokens, **options))


def test_save_is_byte_equal(model: Any, pair: Pair, tmp_path: Path) -> None:
    logits_of(model)
    model.save_pretrained(tmp_path / "saved")
    assert_same_files(pair.aqlm, tmp_path / "saved")
    assert section_of(pair.aqlm) == section_of(tmp_path / "saved")


def test_reload(name: str, model: Any, dense: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "saved", max_shard_size="50KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    assert_same_logits(FAMILIES[name].auto.from_pretrained(tmp_path / "saved", dtype="auto"), dense)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_compile_fullgraph(backend: str, model: Any, dense: Any) -> None:
    logits_of(model)  # Transformers installs hooks in the first call of a vision tower, which Dynamo cannot trace
    compiled: Any = torch.compile(model, fullgraph=True, backend=backend)
    assert_same_logits(compiled, dense)


def test_offload(model: Any, dense: Any, pair: Pair, tmp_path: Path) -> None:
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert_same_logits(model, dense)
    assert all(parameter.is_meta for parameter in model.parameters())
    with pytest.warns(UserWarning, match="offloaded modules"):
        model.save_pretrained(tmp_path / "saved")
    assert_same_files(pair.aqlm, tmp_path / "saved")
    assert not hasattr(model, "hf_device_map")
    with pytest.raises(ValueError, match="load the model without offloading"):
        model.dequantize()


def test_dequantize(model: Any, dense: Any, pair: Pair, tmp_path: Path) -> None:
    model.dequantize()
    assert not any(isinstance(parameter, AQLMTensor) for parameter in model.parameters())
    assert_same_logits(model, dense)
    model.save_pretrained(tmp_path / "dense")
    assert_same_files(pair.dense, tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
