"""The checker of the numerics contract finds the mistakes that kernels make."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from aqlm_tensor.kernels import reference
from aqlm_tensor.scheme import AQLMScheme
from tests.conformance import assert_dequantize, assert_input_grad, assert_kernel, assert_linear
from tests.strategies import Case, build

Linear = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]
NORMAL = Case(AQLMScheme(2, 8), 256, 32, 8, bias=True)


def _right(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    return reference.linear(x, codes, codebooks, scales, bias)


def _drops_the_last_group(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    group = codebooks.shape[-1]
    return _right(x[:, :-group], codes[:, :-1], codebooks, scales, bias)


def _drops_one_group_of_one_row(
    x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None
) -> Tensor:
    y = _right(x, codes, codebooks, scales, bias)
    y[:, 7] -= _right(x[:, :8], codes[7:8, :1], codebooks, scales[7:8], None)[:, 0]
    return y


def _ignores_the_second_codebook(
    x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None
) -> Tensor:
    return _right(x, codes[..., :1], codebooks[:1], scales, bias)


def _reads_codes_unsigned(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    return _right(x, codes.clamp(min=0), codebooks, scales, bias)


def _forgets_the_bias(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    return _right(x, codes, codebooks, scales, None)


def _accumulates_in_half(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    y = x.new_zeros(x.shape[0], codes.shape[0])
    for column in range(codes.shape[1]):
        window = slice(8 * column, 8 * column + 8)
        y += _right(x[:, window].half().float(), codes[:, column : column + 1], codebooks, scales, None).half().float()
    return y if bias is None else y + bias


def _leaves_the_last_output(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    y = torch.empty(x.shape[0], codes.shape[0], dtype=x.dtype)
    y[:, :-1] = _right(x, codes, codebooks, scales, bias)[:, :-1]
    return y


def _mixes_rows(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    return _right(x + 0 * x.sum(0), codes, codebooks, scales, bias)


def _changes_its_input(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    y = _right(x, codes, codebooks, scales, bias)
    x.mul_(2)
    return y


def _depends_on_the_threads(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    return _right(x, codes, codebooks, scales, bias) * (1 + 1e-7 * torch.get_num_threads())


def _is_random(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    return _right(x, codes, codebooks, scales, bias) * (1 + 1e-7 * torch.rand(x.shape[0], 1))


NONFINITE = Case(AQLMScheme(2, 8), 40, 8, 7, values="nonfinite")

WRONG: dict[str, tuple[Linear, Case, str]] = {
    "dropped group": (_drops_the_last_group, NORMAL, "element by element|operand"),
    "dropped group, half": (
        _drops_the_last_group,
        Case(AQLMScheme(2, 8), 1024, 400, 4, torch.bfloat16),
        "normwise|element",
    ),
    "one wrong row": (_drops_one_group_of_one_row, NORMAL, "element by element"),
    "codebook": (_ignores_the_second_codebook, NORMAL, "element by element"),
    "unsigned codes": (_reads_codes_unsigned, NORMAL, "element by element"),
    "bias": (_forgets_the_bias, NORMAL, "element by element"),
    "half sums": (_accumulates_in_half, NORMAL, "element by element"),
    "unwritten": (_leaves_the_last_output, NORMAL, "element by element"),
    "rows": (_mixes_rows, NONFINITE, "element by element"),
    "input": (_changes_its_input, NORMAL, "a second run gave other bits|an operand was changed"),
    "threads": (_depends_on_the_threads, NORMAL, "another number of threads"),
    "random": (_is_random, NORMAL, "a second run gave other bits"),
    "inexact": (_is_random, Case(AQLMScheme(2, 8), 8, 8, 3, values="exact"), "second run|must be exact"),
}


@pytest.mark.parametrize(("linear", "case", "message"), WRONG.values(), ids=WRONG)
def test_finds(linear: Linear, case: Case, message: str) -> None:
    assert_linear(_right, build(case))
    with pytest.raises(AssertionError, match=message):
        assert_linear(linear, build(case))


def test_finds_wrong_gradients_and_weights() -> None:
    operands = build(NORMAL)
    with pytest.raises(AssertionError, match="element by element"):
        assert_input_grad(lambda *args: reference.linear_input_grad(*args).roll(1, 1), operands)
    with pytest.raises(AssertionError, match="element by element"):
        assert_dequantize(lambda *args: reference.dequantize(*args).neg(), operands)


def test_fails_if_another_kernel_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    from aqlm_tensor.kernels import registry

    assert_kernel("torch", "linear", build(NORMAL))
    monkeypatch.setattr(registry, "_choose", lambda *_: registry.Kernel("other", "aqlm_tensor.kernels.reference"))
    with pytest.raises(AssertionError, match="torch was forced for linear, but .*other.* ran"):
        assert_kernel("torch", "linear", build(NORMAL))
