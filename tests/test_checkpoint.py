"""save and load: bit for bit, everything checked before the model changes, and no half-written folder."""

import errno
import json
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchao.quantization import FqnToConfig

from aqlm_tensor import AQLMTensor, checkpoint_io, load, quantize_, save
from aqlm_tensor.checkpoint import inspect
from aqlm_tensor.checkpoint_config import read_config

from .models import TiedLM, config, mlp
from .tensor.weights import weight_of


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A tied model with two schemes."""
    torch.manual_seed(0)
    tied = TiedLM()
    quantize_(tied, FqnToConfig(OrderedDict({"up": config("1x4g8"), "re:first|second": config("2x4g16")})))
    return tied.eval()


@pytest.fixture
def saved(model: nn.Module, tmp_path: Path) -> Path:
    save(model, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(
        left == right and all(torch.equal(p, q) for p, q in zip(parts(x), parts(y), strict=True)) and type(x) is type(y)
        for (left, x), (right, y) in pairs
    )


def parts(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tensor.parts() if isinstance(tensor, AQLMTensor) else (tensor,)


@pytest.mark.parametrize("shard_size", ["5GB", "4KB", 1])
def test_round_trip_is_bit_identical(model: nn.Module, tmp_path: Path, shard_size: int | str) -> None:
    save(model, tmp_path / "out", max_shard_size=shard_size)
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == (shard_size != "5GB")
    loaded = load(TiedLM(), tmp_path / "out").eval()
    assert same(model, loaded)
    assert loaded.head.weight is loaded.embedding.weight
    assert loaded.first.weight is loaded.second.weight
    tokens = torch.arange(9)
    assert torch.equal(model(tokens), loaded(tokens))


def test_load_into_the_meta_device(model: nn.Module, saved: Path) -> None:
    with torch.device("meta"):
        empty = TiedLM()
    assert same(model, load(empty, saved))
    assert empty.embedding.weight.requires_grad
    assert not empty.up.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes_survive(dtype: torch.dtype, tmp_path: Path) -> None:
    half = mlp().to(dtype)
    quantize_(half, config())
    save(half, tmp_path / "half")
    assert same(half, load(mlp(), tmp_path / "half"))


def test_config_names_base_scheme_exceptions_and_dense_layers(saved: Path) -> None:
    section = json.loads((saved / "config.json").read_text())["quantization_config"]
    assert section["quant_method"] == "aqlm"
    assert (section["num_codebooks"], section["nbits_per_codebook"], section["in_group_size"]) == (1, 4, 8)
    assert section["linear_weights_not_to_quantize"] == ["head", "head.weight"]
    assert section["aqlm_tensor"] == {"format_version": 1, "schemes": {"first": "2x4g16"}}
    config_ = read_config(saved)
    assert str(config_.scheme_of("up")) == "1x4g8"
    assert str(config_.scheme_of("first")) == "2x4g16"
    assert config_.dense == {"head"}


def test_inspect_reads_headers_only(saved: Path) -> None:
    rows = {row.name: row for row in inspect(saved)}
    assert str(rows["first.weight"].scheme) == "2x4g16"
    assert rows["first.weight"].shape == (64, 128)
    assert rows["embedding.weight"].scheme is None
    assert rows["up.weight"].nbytes == 128 * 8 + 4 * (16 * 8 + 128)


def test_bin_files_of_the_official_code(model: nn.Module, saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    torch.save(tensors, saved / "pytorch_model.bin")
    section = json.loads((saved / "config.json").read_text())
    assert same(model, load(TiedLM(), saved))
    assert [row.name for row in inspect(saved)] == list(dict.fromkeys(row.name for row in inspect(saved)))
    assert section


def test_no_object_is_unpickled(saved: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable, tuple]:
            return (Path.touch, (tmp_path / "exploded",))

    (saved / "model.safetensors").unlink()
    torch.save({"up.codes": Bomb()}, saved / "pytorch_model.bin", pickle_module=pickle)
    with pytest.raises(ValueError, match="cannot be read"):
        load(TiedLM(), saved)
    assert not (tmp_path / "exploded").exists()


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")

    return edit


def edit_config(**fields: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        whole = json.loads((folder / "config.json").read_text())
        whole["quantization_config"].update(fields)
        (folder / "config.json").write_text(json.dumps(whole))

    return edit


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), "does not exist"),
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "config.json").write_text("{}"), "not of an AQLM checkpoint"),
        (edit_config(quant_method="gptq"), "'gptq'"),
        (edit_config(num_codebooks="two"), "no valid scheme"),
        (edit_config(aqlm_tensor={"format_version": 99}), "format_version 99"),
        (edit_config(num_codebooks=2), "are 1x4g8, but the checkpoint's config says 2x4g8"),
        (edit_config(linear_weights_not_to_quantize=["up.weight"]), "lists it as not quantized"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no checkpoint"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no safetensors"), "damaged, cut short"),
        (edit_tensors(lambda tensors: tensors.pop("up.scales")), "lacks up.scales"),
        (edit_tensors(lambda tensors: tensors.pop("up.bias")), "lacks 1 tensors of the model: up.bias"),
        (edit_tensors(lambda tensors: tensors.update(extra=torch.zeros(3))), "no place in the model: extra"),
        (edit_tensors(lambda tensors: tensors["up.codes"].fill_(100)), "up: codes out of range: found 100..100"),
        (edit_tensors(lambda tensors: tensors.update({"up.bias": torch.zeros(7)})), r"\(7,\).*\(128,\)"),
        (
            edit_tensors(lambda tensors: tensors.update({"up.scales": torch.ones(3, 1, 1, 1)})),
            "tensors of up do not fit together",
        ),
        (edit_tensors(lambda tensors: tensors.update({"up.bias": torch.zeros(128).int()})), "int32.*float32"),
    ],
)
def test_damaged_checkpoints_leave_the_model_alone(damage: Callable, words: str, saved: Path) -> None:
    damage(saved)
    fresh = TiedLM()
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        load(fresh, saved)
    assert all(torch.equal(before[name], tensor) for name, tensor in fresh.state_dict().items())


@pytest.mark.parametrize("size", [8, 1000, 5000])
def test_truncated_files_are_refused(size: int, saved: Path) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="damaged, cut short"):
        load(TiedLM(), saved)


def test_shards_must_agree_with_their_index_and_stay_inside(model: nn.Module, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    save(model, folder, max_shard_size="4KB")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = content["weight_map"]["up.codes"]
    (folder / shard).rename(tmp_path / shard)
    with pytest.raises(ValueError, match="is missing"):
        load(TiedLM(), folder)
    content["weight_map"] = {
        name: f"../{shard}" if home == shard else home for name, home in content["weight_map"].items()
    }
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="must lie in the folder"):
        load(TiedLM(), folder)


def test_existing_folders_are_not_overwritten(model: nn.Module, saved: Path, tmp_path: Path) -> None:
    before = (saved / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="force"):
        save(model, saved)
    assert (saved / "model.safetensors").read_bytes() == before
    save(model, saved, force=True)
    assert same(model, load(TiedLM(), saved))
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="is no checkpoint"):
        save(model, precious, force=True)
    assert (precious / "thesis.txt").exists()


@pytest.mark.parametrize("force", [False, True])
def test_failure_while_writing_leaves_the_old_folder_or_none(
    model: nn.Module, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    target = saved if force else tmp_path / "new"
    monkeypatch.setattr(checkpoint_io, "flush", full)
    with pytest.raises(OSError, match="No space left"):
        save(model, target, force=force)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    assert same(model, load(TiedLM(), saved))


def test_too_small_a_disk_is_said_before_writing(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("usage", (), {"free": 10})
    monkeypatch.setattr(checkpoint_io.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="not enough space"):
        save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no AQLM weight"):
        save(mlp(), tmp_path / "out")
    square: Any = nn.Sequential(nn.Linear(64, 64))
    quantize_(square, config())
    with pytest.raises(ValueError, match="size is a positive number"):
        save(square, tmp_path / "out", max_shard_size="many")
    square[0].weight = nn.Parameter(square[0].weight.t(), requires_grad=False)
    with pytest.raises(ValueError, match="transposed view"):
        save(square, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_partitioned_codebooks_survive(tmp_path: Path) -> None:
    model: Any = nn.Sequential(nn.Linear(64, 128))
    halves: list[torch.Tensor] = [AQLMTensor.from_hp(torch.randn(64, 64), "1x4g8", seed=seed) for seed in (0, 1)]
    model[0].weight = nn.Parameter(torch.cat(halves), requires_grad=False)
    assert weight_of(model[0]).partitions == 2
    save(model, tmp_path / "out")
    assert same(model, load(nn.Sequential(nn.Linear(64, 128)), tmp_path / "out"))
