"""What tune_pv lowers: a divergence from a teacher, kept or asked, or the loss on the text itself."""

import copy

import pytest
import torch
from torch import nn

from aqlm_tensor import tune_pv
from aqlm_tensor.pv.loss import TopLogits, teacher_logits, token_loss
from tests.calibration.test_calibrate import assert_same
from tests.pv.models import QUICK, divergence, prepared


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_the_divergence(dtype: torch.dtype) -> None:
    """Against float64, for more positions than are taken at a time."""
    logits, teacher = torch.randn(2, 700, 50).to(dtype), torch.randn(2, 700, 50).to(dtype)
    wide = logits.double().requires_grad_(True)
    p = teacher.double().log_softmax(-1)
    (p.exp() * (p - wide.log_softmax(-1))).sum(-1).mean().backward()
    logits.requires_grad_(True)
    (3 * token_loss(logits, torch.zeros(2, 700, dtype=torch.int64), teacher)).backward()
    assert logits.grad is not None
    assert wide.grad is not None
    rounding = {torch.float32: 1e-5, torch.bfloat16: 4e-3}[dtype]
    error = logits.grad.double() / 3 - wide.grad
    assert error.norm() <= rounding * wide.grad.norm()
