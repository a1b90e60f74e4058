"""calibrate without fine-tuning: blocks in order, calibrated on what the quantized blocks before them put out."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aqlm_tensor import AQLMTensor, calibrate, quantize_
from aqlm_tensor.blocks import find_blocks, in_blocks, linears_of, members, reading_order, sample_windows
from aqlm_tensor.calibration.report import Progress
from aqlm_tensor.quantizer.observers import observer_of

from .models import config


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)

    def forward(self, x: Tensor, shift: Tensor, *, scale: float = 1.0) -> tuple[Tensor]:
        return (x + scale * self.down(torch.tanh(self.up(x + shift.to(x.dtype)))),)


class Decoder(nn.Module):
    """Embedding, blocks that return a tuple and get other arguments each, and a head."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(32, 48)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for index, block in enumerate(self.blocks):
            (x,) = block(x, torch.full((32,), 0.1 * index), scale=1.0 + index)
        return self.head(x)


def batches(count: int = 3) -> list[Tensor]:
    return [torch.randint(50, (2, 16)) for _ in range(count)]


def by_hand(model: Decoder, data: list[Tensor], scheme: str) -> None:
    """The same through whole forward passes with prepare and convert, block by block."""
    for block in model.blocks:
        members = set(map(id, block.modules()))

        def chosen(module: nn.Module, _: str, members: set[int] = members) -> bool:
            return isinstance(module, nn.Linear) and id(module) in members

        quantize_(model, config(scheme, step="prepare"), chosen)
        for batch in data:
            model(batch)
        quantize_(model, config(scheme, step="convert"), chosen)


def weights(model: nn.Module) -> dict[str, AQLMTensor]:
    return {name: value for name, value in model.named_parameters() if isinstance(value, AQLMTensor)}


def test_equals_prepare_and_convert_block_by_block() -> None:
    one, other = Decoder(), Decoder()
    other.load_state_dict(one.state_dict())
    data = batches()
    report = calibrate(one, config("2x3g8"), data)
    with torch.no_grad():
        by_hand(other, data, "2x3g8")
    ours, theirs = weights(one), weights(other)
    assert list(ours) == list(theirs)
    assert [layer.fqn + ".weight" for layer in report.layers] == list(ours)
    for name, weight in ours.items():
        torch.testing.assert_close(weight.dequantize(), theirs[name].dequantize(), rtol=1e-4, atol=1e-5, msg=name)
    assert not isinstance(one.head.weight, AQLMTensor)


def test_the_first_blocks_only_and_the_mode_is_kept() -> None:
    model = Decoder().train()
    report = calibrate(model, config(), batches(), blocks=model.blocks[:2])
    assert len(report.layers) == 4
    assert not any(name.startswith("blocks.2") for name in weights(model))
    assert model.training
    assert all(observer_of(module) is None for module in model.modules())


def test_progress_and_after_block_see_a_model_that_runs() -> None:
    model = Decoder()
    data = batches()
    seen: list[Progress] = []
    quantized: list[int] = []

    def after(done: int) -> None:
        model(data[0])
        quantized.append(len(weights(model)))
        assert done == len(quantized)

    calibrate(model, config(), data, on_progress=seen.append, after_block=after)
    assert quantized == [2, 4, 6]
    assert [(p.phase, p.block, p.done) for p in seen if p.layer is None] == [
        ("capture", 0, 0),
        ("calibrate", 0, 0),
        ("quantize", 0, 0),
        ("propagate", 0, 2),
        ("calibrate", 1, 2),
        ("quantize", 1, 2),
        ("propagate", 1, 4),
        ("calibrate", 2, 4),
        ("quantize", 2, 4),
    ]
    assert [p.done for p in seen if p.layer is not None] == [1, 2, 3, 4, 5, 6]


def test_an_exception_leaves_layers_whole_and_no_observer() -> None:
    model = Decoder()

    def stop(progress: Progress) -> None:
        if progress.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, config(), batches(), on_progress=stop)
    assert len(weights(model)) == 3
    assert all(observer_of(module) is None for module in model.modules())
    model(batches()[0])


class Shuffled(Decoder):
    """Runs its blocks in another order than they are listed."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in reversed(self.blocks):
            (x,) = block(x, torch.zeros(32))
        return self.head(x)


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (Shuffled(), batches(), "not called in order"),
        (Decoder(), [], "no batches"),
        (nn.Sequential(nn.Linear(8, 8)), batches(), "no nn.ModuleList"),
    ],
)
def test_what_cannot_be_done_is_an_error_before_any_change(model: nn.Module, data: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate(model, config(), data)
    assert not weights(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_scheme_that_does_not_fit_is_an_error_before_any_change() -> None:
    model = Decoder()
    with pytest.raises(ValueError, match="not a multiple"):
        calibrate(model, config("2x4g24"), batches())
    assert not weights(model)


def test_incompatible_layers_can_be_skipped() -> None:
    model = Decoder()
    for block in model.blocks:
        block.up = nn.Linear(32, 60)
        block.down = nn.Linear(60, 32)
    options: dict[str, Any] = {"on_incompatible": "skip"}
    report = calibrate(model, config("2x4g8", **options), batches())
    assert [layer.fqn for layer in report.layers] == ["blocks.0.up", "blocks.1.up", "blocks.2.up"]
    assert set(report.skipped) == {"blocks.0.down", "blocks.1.down", "blocks.2.down"}


def test_blocks_are_the_list_with_the_most_linear_layers() -> None:
    model = Decoder()
    model.extra = nn.ModuleList([nn.Linear(8, 8)])
    assert find_blocks(model) is model.blocks
    chosen = [fqn for fqn, module in model.named_modules() if in_blocks(model, 1)(module, fqn)]
    assert chosen == ["blocks.0.up", "blocks.0.down"]


def test_windows_are_spread_over_the_text() -> None:
    tokens = torch.arange(103)
    assert [window[0, 0].item() for window in sample_windows(tokens, 5, 10)] == [0, 20, 40, 60, 80]
    assert [window[0, 0].item() for window in sample_windows(tokens, 99, 10)] == list(range(0, 100, 10))
    assert all(window.shape == (1, 10) for window in sample_windows(tokens, 3, 10))
    with pytest.raises(ValueError, match="103 tokens, fewer than one window of 104"):
        sample_windows(tokens, 1, 104)
    with pytest.raises(ValueError, match="at least 1"):
        sample_windows(tokens, 0, 10)


class Gated(nn.Module):
    """q, k and v read one tensor, o another; two experts with gate, up and down each, one of which is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = (nn.Linear(32, 32) for _ in range(3))
        self.experts = nn.ModuleList(
            nn.ModuleDict({"gate": nn.Linear(32, 16), "up": nn.Linear(32, 16), "down": nn.Linear(16, 32)})
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.o(torch.sigmoid(self.q(x)) * self.k(x))
        expert: Any = self.experts[1]
        return x + expert["down"](torch.sigmoid(expert["gate"](x)) * expert["up"](x))


def test_reading_order_follows_inputs_and_namesakes() -> None:
    block = Gated()
    names = {id(module): name for name, module in block.named_modules()}
    layers = list(reversed(linears_of([block])))
    groups = reading_order(block, layers, lambda: block(torch.randn(4, 32)))
    assert [sorted(names[id(layer)] for layer in group) for group in groups] == [
        ["k", "q"],
        ["o"],
        ["experts.0.gate", "experts.0.up", "experts.1.gate", "experts.1.up"],
        ["experts.0.down", "experts.1.down"],
    ]


def test_true_sequential_calibrates_later_layers_on_quantized_ones() -> None:
    one, other = Decoder(1), Decoder(1)
    other.load_state_dict(one.state_dict())
    data = batches()
    calibrate(one, config("1x3g8"), data, true_sequential=True)
    with torch.no_grad():
        for name in ("up", "down"):  # each on what is quantized already
            chosen = members([other.blocks[0].get_submodule(name)])  # pyright: ignore[reportArgumentType]
            quantize_(other, config("1x3g8", step="prepare"), chosen)
            for batch in data:
                other(batch)
            quantize_(other, config("1x3g8", step="convert"), chosen)
    for name, weight in weights(one).items():
        torch.testing.assert_close(weight.dequantize(), weights(other)[name].dequantize(), rtol=1e-4, atol=1e-5)


def test_true_sequential_is_not_the_default() -> None:
    one = Decoder(1)
    other = copy.deepcopy(one)
    data = batches()
    calibrate(one, config("1x3g8"), data)
    calibrate(other, config("1x3g8"), data, true_sequential=True)
    same = {name: torch.equal(weight.codes, weights(other)[name].codes) for name, weight in weights(one).items()}
    assert same == {"blocks.0.up.weight": True, "blocks.0.down.weight": False}
