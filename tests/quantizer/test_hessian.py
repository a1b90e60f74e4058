"""HessianAccumulator and SolverConfig: sums against float64, and what they refuse."""

import dataclasses
import json

import pytest
import torch

from aqlm_tensor.quantizer.hessian import HessianAccumulator, check_hessian
from aqlm_tensor.quantizer.solver import SolverConfig


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sum_over_batches_matches_float64(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    accumulator = HessianAccumulator(24)
    expected = torch.zeros(24, 24, dtype=torch.float64)
    for shape in ((3, 50, 24), (7, 24), (24,), (0, 24), (9000, 24)):
        x = torch.randn(shape, generator=generator).to(dtype)
        before = x.clone()
        accumulator.add(x)
        assert torch.equal(x, before)
        rows = x.double().view(-1, 24)
        expected += rows.T @ rows
    value = accumulator.value()
    assert accumulator.tokens == 150 + 7 + 1 + 9000
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=1e-2)
    check_hessian(value, 24)
    value.zero_()
    assert accumulator.value().abs().sum() > 0


def test_the_order_of_batches_does_not_show() -> None:
    batches = [torch.randn(40, 24) * torch.rand(24) for _ in range(30)]
    sums = []
    for order in (range(30), reversed(range(30)), torch.randperm(30).tolist()):
        parts = [HessianAccumulator(24) for _ in range(3)]
        for place, batch in enumerate(order):
            parts[place % 3].add(batches[batch])
        parts[0].merge(parts[2])
        parts[1].merge(parts[0])
        sums.append(parts[1].value())
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0], sums[2])


def test_a_narrowed_sum_can_go_on() -> None:
    accumulator, other = HessianAccumulator(8), HessianAccumulator(8)
    x = torch.randn(5, 8)
    for one in (accumulator, other):
        one.add(x)
    copy = accumulator.clone()
    accumulator.narrowed()
    accumulator.add(x)
    other.add(x)
    assert torch.equal(accumulator.value(), other.value())
    assert torch.equal(copy.value(), 0.5 * other.value()), "a clone is independent"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_non_finite_inputs_leave_the_sum_alone(bad: float) -> None:
    accumulator = HessianAccumulator(8)
    accumulator.add(torch.ones(2, 8))
    x = torch.ones(5, 8)
    x[3, 2] = bad
    with pytest.raises(ValueError, match="NaN, infinite or overflowing"):
        accumulator.add(x)
    assert accumulator.tokens == 2
    assert torch.equal(accumulator.value(), torch.full((8, 8), 2.0))


def test_wrong_inputs_are_refused() -> None:
    accumulator = HessianAccumulator(8)
    with pytest.raises(ValueError, match="8 features"):
        accumulator.add(torch.ones(2, 9))
    with pytest.raises(ValueError, match="8 features"):
        accumulator.add(torch.tensor(1.0))
    with pytest.raises(TypeError, match="floating point"):
        accumulator.add(torch.ones(2, 8, dtype=torch.int64))


def test_config_is_json_able() -> None:
    config = SolverConfig(max_rounds=3, damping=0.5)
    assert SolverConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_rounds", -1),
        ("kmeans_iterations", -1),
        ("conjugate_gradient_steps", 0),
        ("beam_width", 0),
        ("relative_tolerance", 1.0),
        ("relative_tolerance", -0.1),
        ("relative_tolerance", float("nan")),
        ("damping", 0.0),
        ("damping", float("inf")),
    ],
)
def test_config_refuses_values_out_of_range(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        SolverConfig(**{field: value})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("field", "value"), [("max_rounds", 1.5), ("beam_width", True), ("damping", "1")])
def test_config_refuses_types(field: str, value: object) -> None:
    with pytest.raises(TypeError, match=field):
        SolverConfig(**{field: value})  # pyright: ignore[reportArgumentType]
