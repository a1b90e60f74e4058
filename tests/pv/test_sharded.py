"""tune_pv on a model that FSDP2 has sharded over two ranks: as in one process, and each rank keeps its shard."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from aqlm_tensor import AQLMTensor, tune_pv
from aqlm_tensor.pv.report import PVRound
from tests import ranks
from tests.calibration.test_ranks import everyone
from tests.integrations.test_data_parallel import forget_accelerate, fsdp2
from tests.pv.models import QUICK, Decoder, divergence, prepared

FLOAT32 = replace(QUICK, batches_per_step=2, precision="float32")
SHARDED = replace(FLOAT32, epochs=4, gradient_checkpointing=True, gradient_memory=1 << 20)
STEPS = replace(SHARDED, code_fraction=0.0)


def on_device(scheme: str = "2x3g8") -> tuple[Decoder, Decoder, list[Tensor]]:
    torch.manual_seed(0)
    model, dense, data = prepared(scheme)
    return model.to(ranks.device()), dense.to(ranks.device()), data


def sharded(model: Any, **options: Any) -> Any:
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def whole(model: nn.Module) -> dict[str, Tensor]:
    """All parameters of a model, gathered; AQLM weights as their three tensors."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        full: Any = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
        parts = full.parts() if isinstance(full, AQLMTensor) else (full,)
        found |= {f"{name}.{number}": part.cpu() for number, part in enumerate(parts)}
    return found


def assert_sharded(model: nn.Module) -> None:
    """The model's weights are in two parts still, and frozen or not as before."""
    for parameter in model.parameters():
        assert isinstance(parameter, DTensor)
        assert parameter.to_local().shape[0] <= (parameter.shape[0] + 1) // 2
        assert parameter.grad is None
        assert parameter.requires_grad == (not isinstance(parameter.to_local(), AQLMTensor))


def steps_are_those_of_one_process(rank: int, folder: Path) -> None:
    model, dense, data = on_device()
    alone = copy.deepcopy(model)
    expected = tune_pv(alone, dense, data, config=STEPS)
    model, teacher = sharded(model), sharded(copy.deepcopy(dense))
    report = tune_pv(model, teacher, data, config=STEPS, group=everyone())
    assert report.loss_before == pytest.approx(expected.loss_before, rel=1e-6)
    assert [one.training for one in report.rounds] == pytest.approx([one.training for one in expected.rounds], rel=1e-4)
    assert report.loss_after == pytest.approx(expected.loss_after, rel=1e-4)
    assert report.loss_after < 0.8 * report.loss_before
    assert_sharded(model)
    theirs = whole(alone)
    for name, part in whole(model).items():
        torch.testing.assert_close(part, theirs[name], rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


def codes_are_chosen_where_they_are(rank: int, folder: Path) -> None:
    model, dense, data = on_device()
    before, alone = whole(model), copy.deepcopy(model)
    expected = tune_pv(alone, dense, data, config=SHARDED)
    model = sharded(model)
    report = tune_pv(model, dense, data, config=SHARDED, group=everyone())
    after = whole(model)
    names = [name for name, part in after.items() if not part.is_floating_point()]
    shares = [float((before[name] != after[name]).any(-1).float().mean()) for name in names]
    assert list(report.changed.values()) == pytest.approx(shares)
    assert max(shares) > 0
    assert max(one.changed for one in report.rounds) <= SHARDED.code_fraction
    row = 8 / 1024  # groups of a row, of all: rounding may turn a near tie
    assert report.rounds[0].changed == pytest.approx(expected.rounds[0].changed, abs=row)
    assert report.loss_after == pytest.approx(expected.loss_after, rel=0.15)
    found: list[Any] = [None, None]
    dist.all_gather_object(found, (report.loss_after, report.changed))
    assert found[0] == found[1]
    tuned = copy.deepcopy(alone)
    for name, parameter in tuned.named_parameters():
        parts = parameter.parts() if isinstance(parameter, AQLMTensor) else (parameter.detach(),)
        for number, part in enumerate(parts):
            part.copy_(after[f"{name}.{number}"])
    assert divergence(tuned.cpu(), dense.cpu(), data[-3:]) == pytest.approx(report.loss_after, rel=1e-3)


def killed_and_resumed(rank: int, folder: Path) -> None:
    untuned, dense, data = on_device("2x2g8")
    options: dict[str, Any] = {"config": replace(SHARDED, epochs=4), "group": everyone()}
    undisturbed = sharded(copy.deepcopy(untuned))
    tune_pv(undisturbed, dense, data, **options)

    def stop(done: PVRound) -> None:
        if done.step == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune_pv(sharded(copy.deepcopy(untuned)), dense, data, work_dir=folder / "work", on_round=stop, **options)
    dist.barrier()
    model = sharded(copy.deepcopy(untuned))
    tune_pv(model, dense, data, work_dir=folder / "work", resume=True, **options)
    theirs = whole(undisturbed)
    assert all(torch.equal(part, theirs[name]) for name, part in whole(model).items())


def only_the_teacher(rank: int, folder: Path) -> None:
    """A student that fits, and an uneven number of batches to validate on."""
    model, dense, data = on_device()
    other = copy.deepcopy(model)
    settings = replace(FLOAT32, epochs=2)
    whole_teacher = tune_pv(model, dense, data, config=settings, group=everyone())
    sharded_teacher = tune_pv(other, sharded(dense), data, config=settings, group=everyone())
    assert sharded_teacher.loss_after == pytest.approx(whole_teacher.loss_after, rel=1e-4)
    assert sharded_teacher.loss_after < sharded_teacher.loss_before


def half_precision(rank: int, folder: Path) -> None:
    """Dense parameters stay in bfloat16, and are trained in float32 nevertheless; some are of odd sizes."""
    model, dense, data = on_device()
    for network in (model, dense):
        network.head = nn.Linear(32, 41).to(ranks.device())
    dense.head.load_state_dict(model.head.state_dict())
    model = sharded(model.bfloat16(), mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    norm = model.blocks[0].norm.weight.full_tensor().clone()
    settings = replace(STEPS, dense="all", lr=2e-3, epochs=6)
    report = tune_pv(model, dense, data, config=settings, group=everyone())
    assert report.loss_after < 0.8 * report.loss_before
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not torch.equal(model.blocks[0].norm.weight.full_tensor(), norm)
    with torch.no_grad():
        logits = [model(batch.to(ranks.device())).float().log_softmax(-1) for batch in data[-3:]]
        wanted = [dense(batch.to(ranks.device())).log_softmax(-1) for batch in data[-3:]]
    losses = [(q.exp() * (q - p)).sum(-1).mean() for p, q in zip(logits, wanted, strict=True)]
    assert float(torch.stack(losses).mean()) == pytest.approx(report.loss_after, rel=0.02)


def prepared_by_accelerate(rank: int, folder: Path) -> None:
    model, dense, data = on_device()
    accelerator = fsdp2(transformer_cls_names_to_wrap=["Block"], cpu_ram_efficient_loading=False)
    unused = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad])
    model, _ = accelerator.prepare(model, unused)  # which wants an optimizer, too
    report = tune_pv(model, dense, data, config=SHARDED, group=everyone())
    forget_accelerate()
    assert report.loss_after < 0.8 * report.loss_before
    assert_sharded(model)


def refusals(rank: int, folder: Path) -> None:
    model, dense, data = on_device()
    untouched = whole(model)
    partly = copy.deepcopy(model)
    fully_shard(partly.blocks[0])
    fully_shard(partly.blocks[1])
    cases: list[tuple[Any, Any, str]] = [
        (
            sharded(copy.deepcopy(model)),
            {"group": None},
            "over 2 processes, and 1 tune it: pass the same",
        ),
        (sharded(copy.deepcopy(model)), {"config": replace(SHARDED, gradient_checkpointing=False)}, "_checkpointing"),
        (sharded(copy.deepcopy(model)), {"config": replace(SHARDED, gradient_memory=None)}, "pass gradient_memory"),
        (partly, {"config": replace(SHARDED, dense="all")}, "embedding.weight is not sharded"),
    ]
    if ranks.device().type == "cuda":
        offloaded = sharded(copy.deepcopy(model), offload_policy=CPUOffloadPolicy(pin_memory=False))
        cases.append((offloaded, {}, "without an offload_policy"))
    parallel = copy.deepcopy(model)
    mesh = init_device_mesh(ranks.device().type, (2,))
    parallel.head.weight = nn.Parameter(DTensor.from_local(parallel.head.weight.detach(), mesh))
    cases.append((parallel, {}, r"head.weight is distributed as .*tensor parallel"))
    for refused, changes, message in cases:
        with pytest.raises(ValueError, match=message):
            tune_pv(refused, dense, data, **({"config": SHARDED, "group": everyone()} | changes))
    assert all(torch.equal(part, untouched[name]) for name, part in whole(partly).items())


CASES = (
    steps_are_those_of_one_process,
    codes_are_chosen_where_they_are,
    killed_and_resumed,
    only_the_teacher,
    half_precision,
    prepared_by_accelerate,
    refusals,
)


outcomes, test_on_two_ranks = ranks.tests_of(CASES)
