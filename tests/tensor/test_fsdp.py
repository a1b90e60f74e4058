"""FSDP2 and DDP: LoRA trains on sharded AQLM weights as it does in one process, and the codes come back unchanged."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from aqlm_tensor import AQLMTensor
from aqlm_tensor.fusion import fuse_
from aqlm_tensor.linear import set_quantized
from tests import ranks
from tests.lora_on_ranks import assert_trains_as_in_one_process, lora_model, tokens

from .weights import as_aqlm, random_weight, weight_of


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape).to(ranks.device())


def mesh(*shape: int) -> DeviceMesh:
    return init_device_mesh(ranks.device().type, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


def sharded(module: nn.Module, **options: Any) -> Any:
    return fully_shard(module, **{"mesh": mesh(2), **options})


def shard(model: Any, **options: Any) -> Any:
    for layer in model.base_model.model.model.layers:
        sharded(layer, **options)
    return sharded(model, **options)


def assert_sharded_codes(model: Any) -> None:
    """Every AQLM weight is held in equal parts, which together are the codes, bit for bit."""
    original = dict(lora_model().named_parameters())
    count = 0
    for name, parameter in model.named_parameters():
        if not isinstance(original[name], AQLMTensor):
            continue
        count += 1
        assert isinstance(parameter, DTensor)
        local = as_aqlm(parameter.to_local())
        assert local.shape[0] * 2 == original[name].shape[0]
        assert_same(parameter.full_tensor(), original[name])
    assert count == 14


def assert_same(weight: object, expected: object) -> None:
    pairs = zip(as_aqlm(weight).parts(), as_aqlm(expected).parts(), strict=True)
    assert all(torch.equal(part.cpu(), other.cpu()) for part, other in pairs)


def resharded(rank: int, folder: Path) -> None:
    model = shard(lora_model())
    assert_sharded_codes(model)
    assert_trains_as_in_one_process(model, rank)
    assert_sharded_codes(model)


def kept_after_forward(rank: int, folder: Path) -> None:
    model = shard(lora_model(), reshard_after_forward=False)
    assert_trains_as_in_one_process(model, rank)
    assert_sharded_codes(model)


def offloaded(rank: int, folder: Path) -> None:
    model = shard(lora_model(), offload_policy=CPUOffloadPolicy(pin_memory=False))
    assert_trains_as_in_one_process(model, rank)
    assert_sharded_codes(model)


def half_precision(rank: int, folder: Path) -> None:
    """Codebooks and scales are cast, and the stored ones stay float32."""
    seen = []
    model = lora_model()
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    layer.register_forward_pre_hook(lambda module, args: seen.append((weight_of(module).dtype, args[0].dtype)))
    shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    output = model(input_ids=tokens(), labels=tokens())
    output.loss.backward()
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    expected = lora_model().bfloat16()(input_ids=tokens(), labels=tokens())
    torch.testing.assert_close(output.logits, expected.logits, rtol=2**-6, atol=2**-6)
    assert_sharded_codes(model)


def full_state_dicts(rank: int, folder: Path) -> None:
    model = shard(lora_model())
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    assert bool(state) == (rank == 0)
    if rank == 0:
        torch.save(state, folder / "model.pt")
        loaded = lora_model(seed=50)
        loaded.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
        assert torch.equal(loaded(tokens()).logits, lora_model()(tokens()).logits)


def sharded_checkpoints(rank: int, folder: Path) -> None:
    state_dict_saver.save(get_model_state_dict(shard(lora_model())), checkpoint_id=folder / "checkpoint")
    other = shard(lora_model(seed=50))
    before = other(tokens()).logits
    state = get_model_state_dict(other)
    state_dict_loader.load(state, checkpoint_id=folder / "checkpoint")
    set_model_state_dict(other, state)
    after, expected = other(tokens()).logits, lora_model()(tokens()).logits
    assert not torch.equal(before, expected)
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-6)  # which stale codes would not give
    assert_sharded_codes(other)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        stack = random_weight("2x4g8", 32, 64, experts=4, partitions=2)
        self.weight = nn.Parameter(stack, requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(4, 1, 32))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.weight.transpose(1, 2)) + self.bias


def experts_module() -> Any:
    return Experts().to(ranks.device())


def experts(rank: int, folder: Path) -> None:
    """A stack is sharded by expert, codebooks and partitions included."""
    x = rows(4, 3, 64)
    expected = experts_module()(x)
    model = sharded(experts_module())
    for _ in range(2):
        output = model(x)
        output.sum().backward()
        torch.testing.assert_close(output, expected)
    local = as_aqlm(model.weight.to_local())
    assert local.codebooks.shape == (2, 2, 2, 16, 1, 8)
    assert_same(model.weight.full_tensor(), experts_module().weight)


def quantized(weight: AQLMTensor) -> Any:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    set_quantized([layer], weight)
    return layer.to(ranks.device())


def new_codes_are_used(rank: int, folder: Path) -> None:
    """Kernels that keep repacked codes notice that FSDP2 gathered others into the same memory."""
    x = rows(8, 1024)
    for scheme in ("2x8g8", "1x12g8"):
        layer = sharded(quantized(random_weight(scheme, 1024, 1024)), reshard_after_forward=True)
        for seed in (0, 1, 2):
            new: Any = random_weight(scheme, 1024, 1024, seed=seed).to(ranks.device())
            as_aqlm(layer.weight.to_local()).copy_(new.chunk(2)[rank])
            with torch.no_grad():
                torch.testing.assert_close(layer(x), F.linear(x, new))
            assert_same(layer.weight.full_tensor(), new)


def one_rank(rank: int, folder: Path) -> None:
    """FSDP2 on a mesh of one takes another way."""
    of_one = mesh(2, 1)["shard"]
    x, w = rows(4, 64), as_aqlm(random_weight(partitions=2).to(ranks.device()))
    for module, weight in ((quantized(w), w), (experts_module(), experts_module().weight)):
        expected = module(x) if weight is w else module(x.expand(4, 4, 64))
        module: Any = sharded(module, mesh=of_one, reshard_after_forward=True)
        for _ in range(2):
            assert torch.equal(module(x) if weight is w else module(x.expand(4, 4, 64)), expected)
        assert_same(module.weight.full_tensor(), weight)


def hybrid(rank: int, folder: Path) -> None:
    """Replicated over one dimension of the mesh, here with shards over the other."""
    model = shard(lora_model(), mesh=mesh(1, 2))
    assert_trains_as_in_one_process(model, rank)


def refusals(rank: int, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"do not divide its 33 out_features.*ignored_params"):
        sharded(quantized(random_weight(out_features=33)))
    with pytest.raises(ValueError, match="multiples of 4"):
        sharded(quantized(random_weight("2x4g8o4", out_features=20)))
    fused = AQLMTensor(*random_weight(out_features=64, partitions=2).parts())
    with pytest.raises(ValueError, match=r"2 partitions.*unfuse_"):
        sharded(quantized(fused))
    by_column = sharded(quantized(random_weight()), shard_placement_fn=lambda parameter: Shard(1))
    with pytest.raises(ValueError, match=r"only be sharded along dimension 0"):
        by_column(rows(2, 64))


def kept_whole(rank: int, folder: Path) -> None:
    """The remedy that an uneven weight's error names."""
    layer = quantized(random_weight(out_features=33))
    layer.bias = nn.Parameter(torch.zeros(33, device=ranks.device()))
    x = rows(2, 64)
    expected = layer(x)
    sharded(layer, ignored_params={layer.weight})
    assert torch.equal(layer(x), expected)


def layers_that_run_as_one(rank: int, folder: Path) -> None:
    """`fuse_` is for inference; sharded, its layers run one by one."""
    model, expected = lora_model(), lora_model()(tokens()).logits
    fuse_(model)
    assert_trains_as_in_one_process(shard(model), rank)
    torch.testing.assert_close(shard(lora_model())(tokens()).logits, expected)


def data_parallel(rank: int, folder: Path) -> None:
    model = lora_model()
    with pytest.raises(ValueError, match="_set_params_and_buffers_to_ignore_for_model"):
        DistributedDataParallel(model)
    alone = quantized(random_weight())
    alone.bias = nn.Parameter(torch.zeros(32, device=ranks.device()))
    with pytest.raises(ValueError, match="_set_params_and_buffers_to_ignore_for_model"):
        DistributedDataParallel(copy.deepcopy(alone))
    names = [name for name, p in model.named_parameters() if isinstance(p, AQLMTensor)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    assert_trains_as_in_one_process(DistributedDataParallel(model), rank)


CASES = (
    resharded,
    kept_after_forward,
    offloaded,
    half_precision,
    full_state_dicts,
    sharded_checkpoints,
    experts,
    new_codes_are_used,
    one_rank,
    hybrid,
    refusals,
    kept_whole,
    layers_that_run_as_one,
    data_parallel,
)


outcomes, test_on_two_ranks = ranks.tests_of(CASES)


@pytest.mark.parametrize(
    "make",
    [random_weight, lambda: random_weight(partitions=2), lambda: random_weight(experts=3)],
    ids=["matrix", "partitioned", "stack"],
)
def test_a_flat_view_only_goes_back(make: Any) -> None:
    w = make()
    flat = as_aqlm(w.view(-1))
    assert flat.shape == (w.numel(),)
    assert flat.orientation == "flat"
    assert torch.equal(flat.dequantize(), w.dequantize().reshape(-1))
    assert flat.codes.data_ptr() == w.codes.data_ptr()
    back = as_aqlm(flat.view(w.shape))
    assert back.orientation == "matrix"
    assert_same(back, w)
    for attempt in (
        lambda: flat[:8],
        lambda: flat[0],
        lambda: flat.view(w.shape[-1], -1),
        lambda: flat.unsqueeze(0),
        lambda: torch.cat([flat, flat]),
        lambda: F.linear(torch.zeros(1, w.numel()), flat),
        lambda: torch.zeros(1, w.numel()) @ flat,
    ):
        with pytest.raises(ValueError, match=r"dequantize|2-D weight|broadcast"):
            attempt()


def test_zeros_for_shards() -> None:
    w = random_weight(partitions=2)
    with pytest.raises(ValueError, match=r"2 partitions.*unfuse_"):
        w.new_zeros(16, 64)
    assert as_aqlm(torch.zeros_like(w)).partitions == 2
    with pytest.raises(ValueError, match=r"parts of 17.*33 out_features"):
        random_weight(out_features=33).new_zeros(17, 64)
    with pytest.raises(ValueError, match=r"parts of 2.*3 experts"):
        random_weight(experts=3).new_zeros(2, 32, 64)
    with pytest.raises(ValueError, match="no strides"):
        random_weight().as_strided((64, 32), (1, 64))
