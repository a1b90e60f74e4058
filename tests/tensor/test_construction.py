"""What an AQLMTensor accepts, says about itself, and refuses with a message that helps."""

import math

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

from aqlm_tensor.scheme import AQLMScheme
from aqlm_tensor.tensor import AQLMTensor
from tests.conformance import assert_dequantize, dense_weight
from tests.strategies import Case, build, cases, random_parts
from tests.tensor.weights import random_weight


@given(case=cases())
def test_reports_the_dense_weight(case: Case) -> None:
    operands = build(case)
    w = AQLMTensor(*operands.parts)
    assert w.shape == (case.out_features, case.in_features)
    assert w.stride() == torch.empty(w.shape, device="meta").stride()
    assert w.dtype == case.dtype
    assert w.device == operands.codes.device
    assert w.scheme == case.scheme
    assert w.partitions == max(1, case.partitions)
    assert not w.requires_grad
    assert all(mine is given_ for mine, given_ in zip(w.parts(), operands.parts, strict=True))
    stored = case.scheme.bits_per_weight(
        case.out_features, case.in_features, float_bits=8 * case.dtype.itemsize, partitions=w.partitions
    )
    assert w.bits_per_weight == stored or (math.isnan(stored) and math.isnan(w.bits_per_weight))
    w.check_codes()


@given(case=cases())
def test_dequantize(case: Case) -> None:
    assert_dequantize(lambda *parts: AQLMTensor(*parts).dequantize(), build(case))


def test_dequantize_of_views_and_stacks() -> None:
    w = random_weight()
    assert torch.equal(w.t().dequantize(), w.dequantize().t())
    assert torch.equal(w[3].dequantize(), w.dequantize()[3])
    stack = random_weight(experts=3, partitions=2)
    for expert in range(3):
        one = random_weight(partitions=2, seed=expert)
        assert torch.equal(stack.dequantize()[expert], one.dequantize())
    assert stack[:0].dequantize().shape == (0, 32, 64)


def test_follows_the_definition_by_hand() -> None:
    codes = torch.tensor([[[0, -1], [3, 1]]], dtype=torch.int8)  # [1, 2, 2]: for 2-bit codes -1 is entry 3
    codebooks = torch.arange(2 * 4 * 2, dtype=torch.float32).view(2, 4, 1, 2)
    scales = torch.tensor([[[[10.0]]]])
    w = AQLMTensor(codes, codebooks, scales)
    # group 0: books[0][0] + books[1][3] = (0, 1) + (14, 15); group 1: books[0][3] + books[1][1] = (6, 7) + (10, 11)
    expected = torch.tensor([[140.0, 160.0, 160.0, 180.0]])
    assert torch.equal(w.dequantize(), expected)
    assert (dense_weight(*w.parts()) == expected.numpy()).all()


def test_shows_scheme_and_bits() -> None:
    w = random_weight("1x8g16o2", 32, 64, dtype=torch.bfloat16)
    for text in (repr(w), str(w), f"{w}", repr(nn.Parameter(w, requires_grad=False))):
        assert "AQLMTensor" in text
        assert "1x8g16o2" in text
        assert f"{w.bits_per_weight:.3f}" in text
    assert "transposed" in repr(w.t())
    assert w.extra_repr() == f"scheme=1x8g16o2, bits_per_weight={w.bits_per_weight:.3f}"


CODES, CODEBOOKS, SCALES = random_parts("2x8g8", 32, 64)
_3_BOOKS, _2_BOOKS, _0_BOOKS = (CODEBOOKS.expand(partitions, -1, -1, -1, -1) for partitions in (3, 2, 0))

WRONG = {
    "codes is a list": (TypeError, "codes must be a torch.Tensor, got list", [[0]], CODEBOOKS, SCALES),
    "codebooks missing": (TypeError, "codebooks must be a torch.Tensor, got NoneType", CODES, None, SCALES),
    "float codes": (TypeError, "must be torch.int8, got torch.float32", CODES.float(), CODEBOOKS, SCALES),
    "int64 codes": (TypeError, "must be torch.int8, got torch.int64", CODES.long(), CODEBOOKS, SCALES),
    "uint8 codes": (TypeError, "must be torch.int8, got torch.uint8", CODES.view(torch.uint8), CODEBOOKS, SCALES),
    "int16 codes of 8 bits": (TypeError, "must be torch.int8, got torch.int16", CODES.short(), CODEBOOKS, SCALES),
    "float64 codebooks": (TypeError, "codebooks must be float32, float16 or", CODES, CODEBOOKS.double(), SCALES),
    "int codebooks": (TypeError, "codebooks must be float32, float16 or", CODES, CODEBOOKS.int(), SCALES),
    "mixed dtypes": (TypeError, "scales are torch.float16 but codebooks are", CODES, CODEBOOKS, SCALES.half()),
    "mixed devices": (ValueError, "different devices.*move them to one", CODES, CODEBOOKS.to("meta"), SCALES),
    "2-D codes": (ValueError, "codes must have shape", CODES[0], CODEBOOKS, SCALES),
    "3-D codebooks": (ValueError, "codebooks must have shape", CODES, CODEBOOKS[0], SCALES),
    "255 entries": (ValueError, r"2\^nbits entries.*got 255", CODES, CODEBOOKS[:, :255], SCALES),
    "one entry": (ValueError, r"2\^nbits entries.*got 1$", CODES, CODEBOOKS[:, :1], SCALES),
    "no entries": (ValueError, r"2\^nbits entries.*got 0", CODES, CODEBOOKS[:, :0], SCALES),
    "empty groups": (ValueError, "must not be empty", CODES, CODEBOOKS[..., :0], SCALES),
    "no codebooks": (ValueError, "must not be empty", CODES[..., :0], CODEBOOKS[:0], SCALES),
    "one codebook too few": (ValueError, "codes are for 2 codebooks, but there are 1", CODES, CODEBOOKS[:1], SCALES),
    "flat scales": (ValueError, r"scales must have shape \(32, 1, 1, 1\)", CODES, CODEBOOKS, SCALES.flatten()),
    "scales of other rows": (ValueError, "scales must have shape", CODES, CODEBOOKS, SCALES[:31]),
    "3 partitions of 32": (ValueError, "32 output groups cannot be split into 3", CODES, _3_BOOKS, SCALES),
    "0 partitions": (ValueError, "into 0 equal partitions", CODES, _0_BOOKS, SCALES),
    "experts differ": (ValueError, "codebooks must have shape", CODES[None], _2_BOOKS, SCALES[None]),
}


@pytest.mark.parametrize(("error", "message", "codes", "codebooks", "scales"), WRONG.values(), ids=WRONG)
def test_refuses(error: type[Exception], message: str, codes: Tensor, codebooks: Tensor, scales: Tensor) -> None:
    with pytest.raises(error, match=message):
        AQLMTensor(codes, codebooks, scales)


def test_refuses_orientations() -> None:
    with pytest.raises(ValueError, match="orientation must be 'matrix', 'transposed', 'row' or 'flat', got 'diagonal'"):
        AQLMTensor(CODES, CODEBOOKS, SCALES, "diagonal")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="only a single row"):
        AQLMTensor(CODES, CODEBOOKS, SCALES, "row")


def test_check_codes_names_the_range() -> None:
    codes, codebooks, scales = random_parts("2x5g8", 16, 64)
    codes[3, 2, 1] = 32
    with pytest.raises(ValueError, match=r"codes out of range: found -?\d+\.\.32, but 5-bit codes lie in -16\.\.31"):
        AQLMTensor(codes, codebooks, scales).check_codes()


def test_never_requires_a_gradient() -> None:
    w = random_weight()
    for request in (
        lambda: nn.Parameter(w),
        lambda: w.requires_grad_(),
        lambda: setattr(w, "requires_grad", True),
        lambda: nn.ParameterList([nn.Parameter(w, requires_grad=False)]).requires_grad_(),
    ):
        with pytest.raises(RuntimeError, match="trainable"):
            request()
    w.requires_grad_(False)
    w.requires_grad = False
    assert not w.requires_grad


def test_undefined_operations_name_the_remedy() -> None:
    w = random_weight()
    for operation in (
        lambda: w * w,
        lambda: w + w,
        lambda: w.abs(),
        lambda: w == w,
        lambda: torch.isfinite(w),
        lambda: w.norm(),
        lambda: w.sum(),
        lambda: w.fill_(0.0),
        lambda: nn.functional.embedding(torch.tensor([1]), w),
    ):
        with pytest.raises(NotImplementedError, match=r"call `\.dequantize\(\)` first"):
            operation()


def test_from_hp_errors() -> None:
    weight = torch.randn(32, 64)
    with pytest.raises(ValueError, match="unknown scheme '2by8'"):
        AQLMTensor.from_hp(weight, "2by8")
    with pytest.raises(ValueError, match="in_features 64 is not a multiple"):
        AQLMTensor.from_hp(weight, "2x8g48")
    with pytest.raises(ValueError, match="out_features 32 is not a multiple"):
        AQLMTensor.from_hp(weight, "2x4g8o3")
    with pytest.raises(TypeError):
        AQLMTensor.from_hp(weight.int(), "2x4g8")
    with pytest.raises(ValueError, match="finite"):
        AQLMTensor.from_hp(weight.index_fill(1, torch.tensor([3]), float("nan")), "2x4g8")


def test_from_hp_is_deterministic_and_leaves_the_weight_alone() -> None:
    weight = torch.randn(32, 64, dtype=torch.bfloat16)
    copy = weight.clone()
    scheme = AQLMScheme.parse("2x4g8")
    first, second = (AQLMTensor.from_hp(weight, scheme, seed=7) for _ in range(2))
    assert torch.equal(weight, copy)
    assert first.scheme == scheme
    assert first.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(first.parts(), second.parts(), strict=True))
    assert AQLMTensor.from_hp(weight, scheme, codebook_dtype=torch.float32).dtype == torch.float32
