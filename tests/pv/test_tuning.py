"""tune_pv: the loss falls, codes change, nothing ends worse, a run that was killed goes on to the same bits."""

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aqlm_tensor import AQLMTensor, PVConfig, fuse_, quantize_, tune_pv
from aqlm_tensor.blocks import in_blocks
from aqlm_tensor.linear import set_quantized
from aqlm_tensor.pv.loss import TopLogits, call_model, teacher_logits, token_loss
from aqlm_tensor.pv.report import PVReport, PVRound
from tests.calibration.test_calibrate import assert_same, state
from tests.models import TiedLM, config

QUICK = PVConfig(epochs=3, lr=1e-2, steps_per_round=6, validation=0.25)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Decoder(nn.Module):
    """A language model whose logits depend on its blocks strongly enough to see what quantizing does."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 32)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(32, 40, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def batches(count: int = 12) -> list[Tensor]:
    return [torch.randint(40, (4, 16)) for _ in range(count)]


def prepared(scheme: str = "2x3g8") -> tuple[Decoder, Decoder, list[Tensor]]:
    """(quantized, dense, batches)."""
    dense = Decoder().eval()
    model = copy.deepcopy(dense)
    quantize_(model, config(scheme), in_blocks(model))
    return model, dense, batches()


def divergence(model: nn.Module, dense: nn.Module, data: list[Tensor]) -> float:
    """Of the model's distributions from the dense one's, in float64, without any code of the library."""
    with torch.no_grad():
        pairs = [(dense(batch).double().log_softmax(-1), model(batch).double().log_softmax(-1)) for batch in data]
    return float(torch.cat([(p.exp() * (p - q)).sum(-1).flatten() for p, q in pairs]).mean())


def codes(model: nn.Module) -> list[Tensor]:
    return [p.codes.clone() for p in model.parameters() if isinstance(p, AQLMTensor)]


def test_the_loss_falls_codes_change_and_the_report_tells_the_truth() -> None:
    model, dense, data = prepared()
    held_out = data[-3:]
    before, old = divergence(model, dense, held_out), codes(model)
    head, norm = model.head.weight.clone(), model.get_parameter("blocks.0.norm.weight").clone()
    rounds: list[PVRound] = []
    report = tune_pv(model, dense, data, config=QUICK, on_round=rounds.append)
    after = divergence(model, dense, held_out)
    assert report.loss_before == pytest.approx(before, rel=1e-4)
    assert report.loss_after == pytest.approx(after, rel=1e-4)
    assert after < 0.7 * before
    shares = [float((a != b).any(-1).float().mean()) for a, b in zip(old, codes(model), strict=True)]
    assert list(report.changed.values()) == pytest.approx(shares)
    assert max(shares) > 0, "no code changed"
    assert max(r.changed for r in rounds) <= QUICK.code_fraction
    assert tuple(rounds) == report.rounds
    assert [r.step for r in rounds] == [6, 12, 18, 24, 27]
    assert torch.equal(model.head.weight, head), "dense matrices stay"
    assert not torch.equal(model.get_parameter("blocks.0.norm.weight"), norm), "norms are trained"
    assert type(model.get_submodule("blocks.0.up")) is nn.Linear
    assert "forward" not in vars(model.get_submodule("blocks.0.up"))
    assert "27 steps in 5 rounds" in str(report)


def test_the_choice_of_codes_alone_mends_wrong_ones_and_more() -> None:
    model, dense, _ = prepared("2x5g8")
    data = batches(48)
    fine = divergence(model, dense, data[-6:])
    weight = model.get_submodule("blocks.0.down").weight
    assert isinstance(weight, AQLMTensor)
    wrong = torch.rand(weight.codes.shape[:2]) < 0.3
    weight.codes[wrong] = torch.randint(-16, 16, weight.codes.shape, dtype=torch.int8)[wrong]
    standstill = PVConfig(epochs=6, lr=1e-12, steps_per_round=8, validation=0.125, patience=99)
    report = tune_pv(model, dense, data, config=standstill)
    assert report.loss_before > 2 * fine
    assert report.loss_after < 0.5 * fine
    assert report.changed["blocks.0.down"] > 0.3
    assert all(share.changed <= standstill.code_fraction for share in report.rounds)


@pytest.mark.parametrize("trust_ratio", [0.02, 1e-6])
def test_little_trust_keeps_layers_where_they_are(trust_ratio: float) -> None:
    model, dense, data = prepared()
    layer = model.get_submodule("blocks.0.down")
    assert isinstance(layer.weight, AQLMTensor)
    before = layer.weight.dequantize()
    config = PVConfig(epochs=1, lr=1e-12, steps_per_round=5, validation=0.25, trust_ratio=trust_ratio)
    tune_pv(model, dense, data, config=config)  # 9 steps: codes are chosen once
    assert isinstance(layer.weight, AQLMTensor)
    moved = float((layer.weight.dequantize() - before).norm() / before.norm())
    assert moved <= trust_ratio


def test_a_hopeless_learning_rate_changes_nothing() -> None:
    model, dense, data = prepared()
    before = copy.deepcopy(model)
    report = tune_pv(model, dense, data, config=PVConfig(epochs=1, lr=1e3, steps_per_round=3, patience=2))
    assert report.loss_after == report.loss_before
    assert set(report.changed.values()) == {0.0}
    assert len(report.rounds) == 2, "patience ends it"
    assert_same(before, model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_never_worse_as_they_are_stored(dtype: torch.dtype) -> None:
    model, dense, data = prepared()
    model = model.to(dtype)
    training = [part.training for part in model.modules()]
    report = tune_pv(model, dense, data, config=QUICK)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert [part.training for part in model.modules()] == training
    wide = copy.deepcopy(model).float()
    assert divergence(wide, dense, data[-3:]) == pytest.approx(report.loss_after, rel=1e-3)
    assert report.loss_after < report.loss_before
    model(data[0])


def test_autocast_tunes_too() -> None:
    model, dense, data = prepared()
    before = divergence(model, dense, data[-3:])
    tune_pv(model, dense, data, config=PVConfig(epochs=3, lr=1e-2, steps_per_round=6, precision="bfloat16"))
    assert divergence(model, dense, data[-3:]) < 0.8 * before


def test_without_a_teacher_the_text_is_learned() -> None:
    model, _, _ = prepared()
    data = [torch.arange(offset, offset + 64).view(4, 16) % 40 for offset in range(12)]

    def likelihood() -> float:
        with torch.no_grad():
            losses = [
                nn.functional.cross_entropy(model(b)[:, :-1].flatten(0, 1).double(), b[:, 1:].flatten())
                for b in data[-3:]
            ]
        return float(torch.stack(losses).mean())

    before = likelihood()
    report = tune_pv(model, None, data, config=QUICK)
    assert report.loss_before == pytest.approx(before, rel=1e-4)
    assert report.loss_after == pytest.approx(likelihood(), rel=1e-4)
    assert report.loss_after < 0.8 * before


def test_logits_kept_from_the_teacher_are_as_good_as_the_teacher() -> None:
    models = [prepared() for _ in range(1)] * 3
    model, dense, data = models[0]
    others = [copy.deepcopy(model) for _ in range(2)]
    tune_pv(model, dense, data, config=QUICK)
    tune_pv(others[0], teacher_logits(dense, data), data, config=QUICK)
    assert_same(model, others[0])
    before = divergence(others[1], dense, data[-3:])
    tune_pv(others[1], teacher_logits(dense, data, top_k=8), data, config=QUICK)
    assert divergence(others[1], dense, data[-3:]) < 0.8 * before


def test_losses_agree_with_float64() -> None:
    logits, teacher = torch.randn(2, 700, 50), torch.randn(2, 700, 50)
    batch = torch.randint(50, (2, 700))
    p, q = teacher.double().log_softmax(-1), logits.double().log_softmax(-1)
    exact = float((p.exp() * (p - q)).sum(-1).mean())
    assert float(token_loss(logits, batch, teacher)) == pytest.approx(exact, rel=1e-6)
    top = p.topk(50)
    assert float(token_loss(logits, batch, TopLogits(top.values, top.indices))) == pytest.approx(exact, rel=1e-5)
    few, own = p.topk(5), q.gather(-1, p.topk(5).indices)
    rest, own_rest = 1 - few.values.exp().sum(-1), 1 - own.exp().sum(-1)
    coarse = (few.values.exp() * (few.values - own)).sum(-1) + rest * (rest / own_rest).log()
    assert float(token_loss(logits, batch, TopLogits(few.values, few.indices))) == pytest.approx(
        float(coarse.mean()), rel=1e-5
    )
    text = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), batch[:, 1:].flatten())
    assert float(token_loss(logits, batch, None)) == pytest.approx(float(text), rel=1e-6)


@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}, {"batches_per_step": 1}])
def test_recomputing_activations_leaves_the_first_steps_alone(changes: dict[str, Any]) -> None:
    model, dense, data = prepared()
    other = copy.deepcopy(model)
    options = {"epochs": 1, "lr": 1e-2, "steps_per_round": 9, "validation": 0.25}
    tune_pv(model, dense, data, config=PVConfig(**options))
    tune_pv(other, dense, data, config=PVConfig(**options, **changes))
    assert_same(model, other)


def test_memory_for_gradients_can_be_bounded() -> None:
    model, dense, data = prepared()
    old = codes(model)
    settings = {"epochs": 6, "lr": 1e-2, "steps_per_round": 6, "validation": 0.25, "patience": 99}
    report = tune_pv(model, dense, data, config=PVConfig(**settings, gradient_memory=1))
    assert report.loss_after < report.loss_before
    assert len(old) == 4
    assert max(r.changed for r in report.rounds) < 0.02, "one of four layers in each round"


def test_partitions_keep_their_codebooks_apart() -> None:
    model, dense, data = prepared()
    layer = model.get_submodule("blocks.0.up")
    halves = [
        AQLMTensor.from_hp(part, "2x3g8", seed=number)
        for number, part in enumerate(dense.get_parameter("blocks.0.up.weight").detach().chunk(2))
    ]
    joined = torch.cat(tuple(halves))
    assert isinstance(joined, AQLMTensor)
    assert joined.partitions == 2
    assert isinstance(layer, nn.Linear)
    set_quantized([layer], joined)
    before, old = divergence(model, dense, data[-3:]), joined.codes.clone()
    tune_pv(model, dense, data, config=QUICK)
    assert divergence(model, dense, data[-3:]) < 0.8 * before
    assert isinstance(layer.weight, AQLMTensor)
    assert layer.weight.partitions == 2
    assert not torch.equal(layer.weight.codes, old)


def test_layers_that_share_a_weight_still_do() -> None:
    dense = TiedLM().eval()
    model = copy.deepcopy(dense)
    quantize_(model, config("2x3g8"), lambda module, _: module in (model.up, model.first, model.second))

    class Rows(nn.Module):
        """Logits [B, seqlen, vocabulary] of a model whose norm wants [N, width]."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, tokens: Tensor) -> Tensor:
            return self.inner(tokens.flatten()).view(*tokens.shape, -1)

    data = batches()
    report = tune_pv(Rows(model), Rows(dense), data, config=QUICK)
    assert report.loss_after < report.loss_before
    assert model.first.weight is model.second.weight
    assert list(report.changed) == ["inner.up", "inner.first"]


@pytest.mark.parametrize(
    ("settings", "moved"),
    [
        (PVConfig(epochs=1, lr=1e-2, steps_per_round=3, dense="none"), set()),
        (
            PVConfig(epochs=1, lr=1e-2, steps_per_round=3, dense="all"),
            {"embedding.weight", "head.weight", "blocks.0.norm.weight"},
        ),
    ],
)
def test_dense_parameters_on_request(settings: PVConfig, moved: set[str]) -> None:
    model, dense, data = prepared()
    before = {name: value.clone() for name, value in model.named_parameters() if not isinstance(value, AQLMTensor)}
    tune_pv(model, dense, data, config=settings)
    changed = {name for name, value in before.items() if not torch.equal(value, model.get_parameter(name))}
    assert moved <= changed
    assert bool(changed) == bool(moved)
    assert all(parameter.grad is None for parameter in model.parameters())


class Killed(BaseException):
    """What a test raises in place of a kill."""


def killed_after(rounds: int, model: nn.Module, dense: nn.Module, data: list[Tensor], folder: Path) -> PVReport | None:
    """Tune but stop after so many more rounds; the report if that was enough."""
    left = rounds

    def stop(_: PVRound) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed

    try:
        return tune_pv(model, dense, data, config=QUICK, work_dir=folder, resume=True, on_round=stop)
    except Killed:
        return None


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    untuned, dense, data = prepared()
    whole = copy.deepcopy(untuned)
    expected = tune_pv(whole, dense, data, config=QUICK)
    generator = random.Random(0)
    for attempt in range(4):
        report, model = None, untuned
        while report is None:
            model = copy.deepcopy(untuned)
            report = killed_after(generator.choice([1, 2, 3]), model, dense, data, tmp_path / str(attempt))
            assert divergence(model, dense, data[-3:]) <= expected.loss_before * (1 + 1e-6), "the best so far"
        assert_same(whole, model)
        assert report.changed == expected.changed
        assert [r.validation for r in report.rounds] == [r.validation for r in expected.rounds]
    again = copy.deepcopy(untuned)
    done = tune_pv(again, dense, data, config=QUICK, work_dir=tmp_path / "0", resume=True)
    assert_same(whole, again)
    assert done.loss_after == expected.loss_after


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    model, dense, data = prepared()
    tune_pv(copy.deepcopy(model), dense, data, config=QUICK, work_dir=tmp_path)
    before = state(copy.deepcopy(model))
    with pytest.raises(FileExistsError, match="resume=True"):
        tune_pv(model, dense, data, config=QUICK, work_dir=tmp_path)
    with pytest.raises(ValueError, match="another config and data"):
        tune_pv(model, dense, data[1:], config=PVConfig(), work_dir=tmp_path, resume=True)
    with pytest.raises(ValueError, match="another teacher"):
        tune_pv(model, None, data, config=QUICK, work_dir=tmp_path, resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="no folder of a tuning run"):
        tune_pv(model, dense, data, config=QUICK, work_dir=tmp_path / "other", resume=True)
    with pytest.raises(ValueError, match="needs the work_dir"):
        tune_pv(model, dense, data, config=QUICK, resume=True)
    assert all(torch.equal(before[name], value) for name, value in state(model).items())


def fused() -> nn.Module:
    model = nn.Sequential(nn.Embedding(40, 64), Pair(), nn.Linear(64, 40))
    quantize_(model, config(), lambda module, name: name.startswith("1."))
    fuse_(model)
    return model


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate_proj(x).tanh() * self.up_proj(x)


def hooked() -> nn.Module:
    model = prepared()[0]
    layer = model.get_submodule("blocks.0.up")
    layer.forward = layer.forward  # as accelerate's hooks leave it
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Decoder, "no AQLM layer to tune"),
        (fused, "unfuse_"),
        (hooked, "remove_hook_from_module"),
        (lambda: prepared()[0].to("meta"), "meta device"),
    ],
)
def test_models_that_cannot_be_tuned(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tune_pv(make(), None, batches(), config=QUICK)


def test_bad_arguments_are_errors_before_any_change() -> None:
    model, dense, data = prepared()
    before = state(copy.deepcopy(model))
    cases: list[tuple[Any, Any, type[Exception], str]] = [
        (model, data, ValueError, "shares parameters"),
        ("dense", data, ValueError, "logits for 5 batches"),
        (3, data, TypeError, "teacher must be"),
        ([torch.zeros(4, 15, 40)] * 12, data, ValueError, r"batch 0 must have shape \[4, 16, \*\]"),
        ([torch.zeros(4, 16, 39)] * 12, data, ValueError, "same vocabulary"),
        (dense, data[:1], ValueError, "at least 2 batches"),
        (dense, torch.stack(data), TypeError, "sequence"),
        (dense, [*data, torch.zeros(4, 16)], ValueError, "batch 12 must be token ids"),
        (dense, [torch.zeros(4, dtype=torch.int64)] * 3, ValueError, "batch 0 must be token ids"),
    ]
    for teacher, given, error, message in cases:
        with pytest.raises(error, match=message):
            tune_pv(model, teacher, given, config=QUICK)
    broken = copy.deepcopy(dense)
    nn.init.constant_(broken.head.weight, float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        tune_pv(model, broken, data, config=QUICK)
    with pytest.raises(TypeError, match="PVConfig"):
        tune_pv(model, dense, data, config={})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="logits"):
        call_model(nn.Sequential(nn.Embedding(40, 8), nn.Flatten()), data[0])
    assert all(torch.equal(before[name], value) for name, value in state(model).items())


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs must be at least 1"),
        ({"lr": 0.0}, ValueError, "lr must be positive"),
        ({"trust_ratio": float("inf")}, ValueError, "trust_ratio must be positive and finite"),
        ({"code_fraction": 1.5}, ValueError, r"code_fraction must lie in \[0, 1\]"),
        ({"validation": 1}, ValueError, "validation must lie between"),
        ({"dense": "some"}, ValueError, "dense must be one of none, vectors, all"),
        ({"precision": "int4"}, ValueError, "precision must be one of"),
        ({"gradient_memory": 0}, ValueError, "gradient_memory must be None or positive"),
        ({"gradient_memory": 1.5}, TypeError, "gradient_memory must be an int"),
        ({"gradient_checkpointing": 1}, TypeError, "True or False"),
        ({"seed": "x"}, TypeError, "seed must be an int"),
    ],
)
def test_configs_that_make_no_sense(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PVConfig(**fields)
