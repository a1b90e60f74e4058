"""Every kernel of the registry, forced by name, against the numerics contract."""

import pytest
import torch
from hypothesis import assume, given

from aqlm_tensor.kernels import registry
from aqlm_tensor.kernels.registry import Kernel, Op, Problem
from tests.conformance import assert_kernel
from tests.strategies import LARGE_CASES, Case, build, cases

OPS: tuple[Op, ...] = ("linear", "linear_input_grad", "dequantize")

every_kernel = pytest.mark.parametrize("kernel", registry.KERNELS, ids=lambda kernel: kernel.name)
every_op = pytest.mark.parametrize("op", OPS)


def _problem(op: Op, case: Case) -> Problem:
    rows = 0 if op == "dequantize" else case.rows
    return Problem(
        op,
        case.scheme,
        rows,
        case.in_features,
        case.out_features,
        max(1, case.partitions),
        case.dtype,
        torch.device("cpu"),
    )


def _check(kernel: Kernel, op: Op, case: Case) -> bool:
    """Whether the kernel ran; if it says no, that it gives its reason when forced all the same."""
    reason = kernel.why_not(_problem(op, case))
    if reason is None:
        assert_kernel(kernel.name, op, build(case))
        return True
    assert reason.strip(), f"{kernel.name} refuses {case} without a reason"
    with pytest.raises(ValueError, match="was forced but cannot run") as error:
        assert_kernel(kernel.name, op, build(case))
    assert reason in str(error.value)
    return False


@every_kernel
@every_op
@given(case=cases())
def test_drawn_cases(kernel: Kernel, op: Op, case: Case) -> None:
    assume(_check(kernel, op, case) or kernel.device_types not in ((), ("cpu",)))


@every_kernel
@every_op
@pytest.mark.parametrize("case", LARGE_CASES.values(), ids=LARGE_CASES)
def test_large_cases(kernel: Kernel, op: Op, case: Case) -> None:
    _check(kernel, op, case)
