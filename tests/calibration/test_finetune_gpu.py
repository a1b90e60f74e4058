"""Fine-tuning of blocks on a GPU: passes replayed as a CUDA graph do what passes do, and those that cannot are run."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as tf

from aqlm_tensor import CalibrationReport, FinetuneConfig, calibrate
from aqlm_tensor.calibration import finetune
from aqlm_tensor.pv.graph import GraphedPasses
from tests.calibration.test_block_calls import GROUPED, padded, token_ids
from tests.models import config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

TUNING = FinetuneConfig(epochs=3, lr=3e-3, validation=0.2, patience=9)


@contextmanager
def counted() -> Iterator[list[int]]:
    """Inside the block of code, the passes that each captured graph replays are counted."""
    replays: list[int] = []
    capture, replay = GraphedPasses._capture, torch.cuda.CUDAGraph.replay

    def captured(self: GraphedPasses, batch: Any) -> None:
        capture(self, batch)
        replays.append(0)

    def replayed(self: torch.cuda.CUDAGraph) -> None:
        replay(self)
        replays[-1] += 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GraphedPasses, "_capture", captured)
        patch.setattr(torch.cuda.CUDAGraph, "replay", replayed)
        yield replays


def tuned(data: Any, device: str = "cuda", **changes: Any) -> tuple[CalibrationReport, tf.LlamaForCausalLM]:
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED)).eval()
    torch.manual_seed(1)
    settings = FinetuneConfig(**{**vars(TUNING), **changes})
    return calibrate(model, config("1x4g4"), data(), device=device, finetune=settings), model


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_passes_are_replayed(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with counted() as replays:
        report, model = tuned(lambda: token_ids(10), precision=precision)
    assert replays == [3 * 8 - 1] * 2, "two blocks, three epochs of eight batches, the first pass as it is"
    assert any(block.error_after < block.error_before for block in report.blocks)
    monkeypatch.setattr(finetune, "gpu_of", lambda _: None)
    with counted() as replays:
        expected, plain = tuned(lambda: token_ids(10), precision=precision)
    assert not replays
    assert [block.error_after for block in report.blocks] == [block.error_after for block in expected.blocks]
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


def test_activations_are_not_kept() -> None:
    """They are gone when a block is done, not when the garbage collector comes by."""
    tuned(lambda: token_ids(4))
    gc.collect()
    before = torch.cuda.memory_allocated()
    gc.disable()
    try:
        tuned(lambda: token_ids(4))
        assert torch.cuda.memory_allocated() == before
    finally:
        gc.enable()


def test_batches_that_are_called_otherwise_are_run() -> None:
    """Masks and lengths that differ from the first batch's."""
    with counted() as replays:
        tuned(lambda: [*padded(), *token_ids(5), *padded()])
    assert replays == [3 * 3 - 1] * 2, "three of nine batches that are trained on have the first one's length and mask"
