"""The numerics contract that every kernel is held to, as one checker.

The reference is float64 numpy on the stored values, written from the format's definition and sharing nothing with
`aqlm_tensor.kernels.reference`. To test a kernel:

    from tests.conformance import assert_kernel
    from tests.strategies import LARGE_CASES, build, cases

    @given(case=cases(schemes=...))
    def test_contract(case):
        assert_kernel("numba", "linear", build(case))      # also "linear_input_grad" and "dequantize"

`assert_kernel` forces the kernel by name, fails if another one ran, and then asserts, on whatever device the operands
lie (`build(case).to("cuda")`):

- element by element |y - ref| <= u |ref| + v (|x| A^T + |bias|) + half a subnormal step, with A = |scales| times the
  sum over codebooks of |entry|; a non-finite reference gives a non-finite output and a finite one a finite output, so
  NaN and infinities stay in their row; results beyond the dtype's range overflow to infinity of the right sign;
- normwise ||y - ref|| <= tolerance ||ref|| for Gaussian data with at least 1024 outputs;
- exact equality with the rounded reference for `values="exact"`, whose float32 sums have no rounding errors;
- that memory from torch.empty, filled with NaN for the purpose, was written everywhere;
- the same bits from a second run, and on the CPU with another number of threads;
- that no operand was changed.

`assert_linear`, `assert_input_grad` and `assert_dequantize` do the same for a function that is not in the registry, and
`assert_close_to` judges one output.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from aqlm_tensor.kernels import ops, registry
from tests.strategies import Operands

__all__ = [
    "NORMWISE",
    "assert_close_to",
    "assert_dequantize",
    "assert_input_grad",
    "assert_kernel",
    "assert_linear",
    "assert_same_bits",
    "dense_weight",
    "magnitude_weight",
    "threads",
    "uninitialized_is_nan",
]

NORMWISE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}
_UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def dense_weight(codes: Tensor, codebooks: Tensor, scales: Tensor) -> np.ndarray:
    """The weight [O, I] in float64, from the definition of the format."""
    return _weight(codes, _float64(codebooks), _float64(scales))


def magnitude_weight(codes: Tensor, codebooks: Tensor, scales: Tensor) -> np.ndarray:
    """A [O, I] of the contract: |scales| times the sum of the entries' absolute values, in float64."""
    return _weight(codes, np.abs(_float64(codebooks)), np.abs(_float64(scales)))


def _float64(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy()


def _weight(codes: Tensor, codebooks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    if codebooks.ndim == 4:
        codebooks = codebooks[None]
    partitions, num_codebooks, size, out_group, in_group = codebooks.shape
    indices = codes.detach().cpu().numpy().astype(np.int64) % size  # Python's sign: the low N bits
    out_groups, in_groups, _ = indices.shape
    partition = np.arange(out_groups) * partitions // max(1, out_groups)
    weight = np.zeros((out_groups, out_group, in_groups, in_group))
    for k in range(num_codebooks):
        entries = codebooks[partition[:, None], k, indices[:, :, k]]  # [O/H, I/G, H, G]
        weight += entries.transpose(0, 2, 1, 3)
    weight *= scales.reshape(-1, 1, 1, 1)
    return weight.reshape(out_groups * out_group, in_groups * in_group)


def assert_kernel(name: str, op: registry.Op, operands: Operands) -> None:
    """Assert the contract for one kernel and op, forced by name, and that no other kernel ran."""
    function = {"linear": ops.linear, "linear_input_grad": ops.linear_input_grad, "dequantize": ops.dequantize}[op]
    check = {"linear": assert_linear, "linear_input_grad": assert_input_grad, "dequantize": assert_dequantize}[op]
    with registry.force_kernel(name), registry.record() as ran:
        check(function, operands)
    assert ran, f"{op} ran no kernel of the registry"
    assert set(ran) == {(op, name)}, f"{name} was forced for {op}, but {set(ran)} ran"


def assert_linear(linear: Callable[..., Tensor], operands: Operands) -> None:
    """Assert the contract for `linear(x, codes, codebooks, scales, bias)` -> [M, O]."""
    y = _run(linear, operands.x, *operands.parts, operands.bias)
    x = _float64(operands.x)
    bias = _float64(operands.bias) if operands.bias is not None else np.zeros(operands.case.out_features)
    with np.errstate(invalid="ignore", over="ignore"):
        reference = x @ dense_weight(*operands.parts).T + bias
        magnitude = np.abs(x) @ magnitude_weight(*operands.parts).T + np.abs(bias)
    assert_close_to(y, reference, magnitude, operands)


def assert_input_grad(linear_input_grad: Callable[..., Tensor], operands: Operands) -> None:
    """Assert the contract for `linear_input_grad(grad, codes, codebooks, scales)` -> [M, I]."""
    y = _run(linear_input_grad, operands.grad, *operands.parts)
    grad = _float64(operands.grad)
    with np.errstate(invalid="ignore", over="ignore"):
        reference = grad @ dense_weight(*operands.parts)
        magnitude = np.abs(grad) @ magnitude_weight(*operands.parts)
    assert_close_to(y, reference, magnitude, operands)


def assert_dequantize(dequantize: Callable[..., Tensor], operands: Operands) -> None:
    """Assert the contract for `dequantize(codes, codebooks, scales)` -> [O, I]."""
    y = _run(dequantize, *operands.parts)
    assert_close_to(y, dense_weight(*operands.parts), magnitude_weight(*operands.parts), operands)


def assert_close_to(y: Tensor, reference: np.ndarray, magnitude: np.ndarray, operands: Operands) -> None:
    """Assert that an output obeys the bounds.

    Args:
        y: the output, in the case's dtype.
        reference: the exact result in float64, in y's shape.
        magnitude: the same product of absolute values, in y's shape.
        operands: what it was computed from; their case's dtype, values and K decide the bounds.
    """
    case = operands.case
    assert tuple(y.shape) == reference.shape, f"shape {tuple(y.shape)}, expected {reference.shape}"
    assert y.dtype == case.dtype
    actual = _float64(y)
    if case.values == "exact":
        rounded = _float64(torch.from_numpy(reference).to(case.dtype))
        _require(actual == rounded, actual, rounded, case, "sums of small integers must be exact")
        return
    info = torch.finfo(case.dtype)
    u = _UNIT_ROUNDOFF[case.dtype]
    v = 2e-6 if case.dtype == torch.float32 else case.scheme.num_codebooks * u
    with np.errstate(invalid="ignore", over="ignore"):
        bound = u * np.abs(reference) + v * magnitude + info.smallest_normal * info.eps / 2
        # intermediate sums beyond float32 are outside the contract; a result may round to infinity near the limit
        judged = np.isfinite(reference) & (magnitude < torch.finfo(torch.float32).max / 4)
        may_overflow = np.abs(reference) + bound >= info.max
        overflowed = may_overflow & np.isinf(actual) & (np.sign(actual) == np.sign(reference))
        within = np.abs(actual - reference) <= bound
    _require(~judged | within | overflowed, actual, reference, case, "beyond the element by element bound")
    broken = ~np.isfinite(reference)
    _require(~broken | ~np.isfinite(actual), actual, reference, case, "a non-finite input did not reach the output")
    if case.values == "normal" and reference.size >= 1024 and reference.any():
        error = float(np.linalg.norm(actual - reference) / np.linalg.norm(reference))
        assert error <= NORMWISE[case.dtype], f"normwise error {error:.2e} > {NORMWISE[case.dtype]} for {case}"


def _require(good: np.ndarray, actual: np.ndarray, expected: np.ndarray, case: object, what: str) -> None:
    if good.all():
        return
    where = tuple(int(i) for i in np.argwhere(~good)[0])
    raise AssertionError(
        f"{what}: {int((~good).sum())} of {good.size} elements, first at {where}: "
        f"got {actual[where]!r}, expected {expected[where]!r}; {case}"
    )


def _run(function: Callable[..., Tensor], *args: Tensor | None) -> Tensor:
    """The output, after asserting that it is reproducible and that the operands were left alone."""
    before = [None if arg is None else arg.clone() for arg in args]
    with uninitialized_is_nan():
        first = function(*args)
        second = function(*args)
        assert_same_bits(first, second, "a second run gave other bits")
        if first.device.type == "cpu":
            with threads(1 if torch.get_num_threads() > 1 else 2):
                assert_same_bits(first, function(*args), "another number of threads gave other bits")
    for arg, copy in zip(args, before, strict=True):
        if arg is not None and copy is not None:
            assert_same_bits(arg, copy, "an operand was changed")
            assert first.untyped_storage().data_ptr() != arg.untyped_storage().data_ptr() or not first.numel()
    return first


def assert_same_bits(a: Tensor, b: Tensor, message: str = "bits differ") -> None:
    """Assert equal shape, dtype and bits; NaN equals the same NaN."""
    assert a.shape == b.shape, f"{message}: shapes {tuple(a.shape)} and {tuple(b.shape)}"
    assert a.dtype == b.dtype, f"{message}: dtypes {a.dtype} and {b.dtype}"
    as_bytes = (tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b))
    assert torch.equal(*as_bytes), message


@contextlib.contextmanager
def uninitialized_is_nan() -> Iterator[None]:
    """Fill new memory from torch.empty with NaN (integers: the largest value) inside the block."""
    mode = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Run torch's CPU ops, and numba's if it is loaded and has that many, with `count` threads inside the block."""
    numba = sys.modules.get("numba")
    torch_before, numba_before = torch.get_num_threads(), numba.get_num_threads() if numba else 0
    torch.set_num_threads(count)
    if numba:
        numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))
    try:
        yield
    finally:
        torch.set_num_threads(torch_before)
        if numba:
            numba.set_num_threads(numba_before)
