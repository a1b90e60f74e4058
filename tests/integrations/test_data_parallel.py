"""Trainer and accelerate on two ranks: LoRA trains as it does in one process, with DDP and with FSDP2."""

import os
from pathlib import Path
from typing import Any

import accelerate
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

import aqlm_tensor.integrations.hf  # noqa: F401 - registers
from aqlm_tensor import AQLMTensor
from tests import ranks
from tests.lora_on_ranks import assert_trains_as_in_one_process, lora_model, tokens


def on_cpu() -> bool:
    return ranks.device().type == "cpu"


def forget_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]


def accelerator(**options: Any) -> Any:
    forget_accelerate()
    return accelerate.Accelerator(cpu=on_cpu(), **options)


def fsdp2(**options: Any) -> Any:
    """accelerate's FSDP2, which it offers for GPUs only; the rest of it runs on CPUs as well."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True, **options
    )
    found = accelerator(fsdp_plugin=plugin)
    if on_cpu():
        AcceleratorState._shared_state["fsdp_plugin"] = plugin
        for state in (PartialState, AcceleratorState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
    assert found.is_fsdp2
    return found


def codes(model: nn.Module) -> list[Tensor]:
    weights: list[Any] = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return [weight.codes for weight in weights if isinstance(weight, AQLMTensor)]


def assert_same_codes(model: Any) -> None:
    pairs = list(zip(codes(model), codes(lora_model()), strict=True))
    assert len(pairs) == 14
    assert all(torch.equal(one, other) for one, other in pairs)


def ddp(rank: int, folder: Path) -> None:
    model = lora_model()
    assert_trains_as_in_one_process(model, rank, accelerator())
    assert_same_codes(model)


def ddp_brings_adapters_from_rank_0(rank: int, folder: Path) -> None:
    model = lora_model()
    adapter = next(p for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        adapter.fill_(rank + 1)
    prepared = accelerator().prepare(model)
    assert isinstance(prepared, DistributedDataParallel)
    assert bool((adapter == 1).all())


def sharded(rank: int, folder: Path) -> None:
    model = lora_model()
    assert_trains_as_in_one_process(model, rank, fsdp2(cpu_ram_efficient_loading=False))
    assert {type(parameter) for parameter in model.parameters()} == {DTensor}
    assert_same_codes(model)


def sharded_from_rank_0(rank: int, folder: Path) -> None:
    """With what `accelerate config` proposes, other ranks may hold anything in their dense weights."""
    model = lora_model()
    if rank == 1:
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                if not isinstance(tensor, AQLMTensor):
                    tensor.zero_()
    found = fsdp2(cpu_ram_efficient_loading=True)
    assert_trains_as_in_one_process(model, rank, found)
    assert found.state.fsdp_plugin.cpu_ram_efficient_loading
    assert_same_codes(model)


def adapter_of_shards(rank: int, folder: Path) -> None:
    """What a training script does in the end."""
    found = fsdp2(cpu_ram_efficient_loading=True)
    model = lora_model()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model, optimizer = found.prepare(model, optimizer)
    with torch.no_grad():
        expected = model(tokens()).logits
    state = found.get_state_dict(model)
    found.unwrap_model(model).save_pretrained(folder, is_main_process=rank == 0, state_dict=state)
    dist.barrier()
    base = lora_model().unload()
    loaded = PeftModel.from_pretrained(base, str(folder))
    torch.testing.assert_close(loaded(tokens()).logits, expected, rtol=1e-4, atol=1e-5)


def rows() -> Any:  # Trainer takes a list, though its annotation asks for a Dataset
    return [{"input_ids": row, "labels": row} for row in tokens().cpu().repeat(8, 1)]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    forget_accelerate()
    return TrainingArguments(
        output_dir=str(folder), max_steps=12, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
        logging_steps=1, save_strategy="no", use_cpu=on_cpu(), seed=0, disable_tqdm=True, **options,
    )  # fmt: skip


def assert_trained(trainer: Trainer, folder: Path, rank: int) -> None:
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1, losses
    trainer.save_model(str(folder / "adapter"))
    dist.barrier()
    model = PeftModel.from_pretrained(lora_model().unload(), str(folder / "adapter"))
    before, after = (trained(tokens(), labels=tokens()).loss for trained in (lora_model(), model))
    assert after < before - 0.1
    every = [torch.empty_like(after) for _ in range(2)]
    dist.all_gather(every, after.detach())
    assert torch.equal(*every)


def trainer_with_ddp(rank: int, folder: Path) -> None:
    model = lora_model()
    trainer = Trainer(model=model, args=arguments(folder), train_dataset=rows())
    trainer.train()
    assert isinstance(trainer.model_wrapped, DistributedDataParallel)
    assert_same_codes(model)
    assert_trained(trainer, folder, rank)


def trainer_with_checkpointing(rank: int, folder: Path) -> None:
    model = lora_model()
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    trainer = Trainer(model=model, args=arguments(folder, **options), train_dataset=rows())
    trainer.train()
    assert_trained(trainer, folder, rank)


def trainer_with_fsdp2(rank: int, folder: Path) -> None:
    if on_cpu():
        return  # TrainingArguments refuse FSDP without a GPU
    wrapped = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "reshard_after_forward": True}
    trainer = Trainer(
        model=lora_model(),
        args=arguments(folder, fsdp="full_shard auto_wrap", fsdp_config=wrapped),
        train_dataset=rows(),
    )
    trainer.train()
    assert_same_codes(trainer.model)
    assert_trained(trainer, folder, rank)


CASES = (
    ddp,
    ddp_brings_adapters_from_rank_0,
    sharded,
    sharded_from_rank_0,
    adapter_of_shards,
    trainer_with_ddp,
    trainer_with_checkpointing,
    trainer_with_fsdp2,
)


outcomes, test_on_two_ranks = ranks.tests_of(CASES)
