"""Lookups by byte permutation and by scalar loads, each forced, against the numerics contract."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from aqlm_tensor.kernels.numba_bytes import can_permute
from aqlm_tensor.kernels.numba_codes import packed_codes
from aqlm_tensor.kernels.numba_lookup import lookup_linear
from aqlm_tensor.kernels.reference import partitioned
from aqlm_tensor.scheme import AQLMScheme
from tests.conformance import assert_linear, assert_same_bits, threads
from tests.strategies import Case, Operands, build, cases, random_parts, schemes

narrow = schemes().filter(lambda scheme: scheme.nbits_per_codebook <= 8)
both_ways = pytest.mark.parametrize(
    "permute",
    [False, pytest.param(True, marks=pytest.mark.skipif(not can_permute(), reason="needs AVX-512 VBMI"))],
    ids=["scalar", "permute"],
)
permuting = pytest.mark.skipif(not can_permute(), reason="needs AVX-512 VBMI")


def linear(permute: bool, x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    books = partitioned(codebooks)
    bias = None if bias is None else bias.float()
    return lookup_linear(x, codes, books, scales, bias, permute=permute).to(x.dtype)


def check(permute: bool, operands: Operands) -> None:
    assert_linear(lambda *args: linear(permute, *args), operands)


def ordinary(rows: int, groups: int, tokens: int = 1, scheme: str = "2x8g8") -> Operands:
    return build(Case(AQLMScheme.parse(scheme), rows, groups, tokens))


@both_ways
@given(case=cases(schemes=narrow).filter(lambda case: case.rows and case.out_features and case.in_features))
def test_drawn_cases(permute: bool, case: Case) -> None:
    check(permute, build(case))


@both_ways
@given(
    case=cases(schemes=narrow, rows=st.sampled_from((1, 2, 3, 5))).filter(lambda case: case.in_features),
    out_groups=st.sampled_from((63, 64, 255, 256, 257, 320, 575, 1003)),
)
def test_many_rows(permute: bool, case: Case, out_groups: int) -> None:
    """Whole blocks of 256 rows, vectors of 64 beside them, and single rows."""
    check(permute, build(replace(case, out_groups=out_groups * max(1, case.partitions))))


@both_ways
@pytest.mark.parametrize("size", [1e2, 1e4, 1e6, 1e20, float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["input", "entry", "column of entries"])
def test_outliers(permute: bool, size: float, where: str) -> None:
    """One number that dwarfs the others of its block of columns, which not every row takes part in."""
    operands = ordinary(600, 40, 2)
    x, codebooks = operands.x.clone(), operands.codebooks.clone()
    if where == "input":
        x[1, 100] *= size
    elif where == "entry":
        codebooks[1, 77, 0, 3] *= size
    else:
        codebooks[:, :, 0, 5] *= size
    check(permute, replace(operands, case=replace(operands.case, values="wide"), x=x, codebooks=codebooks))


@both_ways
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-20, 1e20])
def test_small_and_large_numbers(permute: bool, scale: float) -> None:
    operands = ordinary(300, 20)
    check(permute, replace(operands, case=replace(operands.case, values="wide"), x=operands.x * scale))


@both_ways
@pytest.mark.parametrize("least", [0.0, 1e-3])
def test_entries_of_very_different_sizes(permute: bool, least: float) -> None:
    """Rows whose entries are all small beside the largest of the same tables keep their own accuracy."""
    operands = ordinary(520, 32)
    codebooks, codes = operands.codebooks.clone(), operands.codes.clone()
    codebooks[:, 128:] *= least
    codes[::2] |= -128  # even rows: small entries only
    codes[1::2] &= 127
    check(permute, replace(operands, codes=codes, codebooks=codebooks, case=replace(operands.case, values="wide")))


@both_ways
@pytest.mark.parametrize("scheme", ["2x8g8", "1x5g4", "8x8g32", "3x7g20o2"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_same_bits_for_any_number_of_threads(permute: bool, scheme: str, tokens: int) -> None:
    parts = random_parts(scheme, 2 * 1100, 1280)
    x = torch.randn(tokens, 1280)
    with threads(1):
        expected = linear(permute, x, *parts, None)
    for repeat in range(20):
        with threads(1 + repeat % 4):
            assert_same_bits(linear(permute, x, *parts, None), expected)


@permuting
def test_blocks_out_of_range_are_looked_up_one_by_one() -> None:
    """Fixed point is used for ordinary numbers, and not where a row's terms might all be zero."""
    operands = ordinary(512, 16)
    x, (codes, codebooks, scales) = operands.x, operands.parts
    other = codebooks.clone()
    other[:, 9] = 0
    for books, same in ((codebooks, False), (other, True)):
        results = [linear(permute, x, codes, books, scales, None) for permute in (True, False)]
        assert torch.equal(*results) == same


@permuting
def test_tokens_do_not_affect_each_other() -> None:
    parts = random_parts("2x8g8", 700, 512)
    x = torch.randn(4, 512)
    x[2, 7] = float("nan")
    x[3] *= 1e30
    together = linear(True, x, *parts, None)
    for token in range(4):
        assert_same_bits(together[token], linear(True, x[token : token + 1], *parts, None)[0])


@pytest.mark.parametrize("partitions", [1, 3])
@pytest.mark.parametrize("rows", [3, 255, 256, 300, 771])
@pytest.mark.parametrize("columns", [1, 15, 16, 37])
def test_packed_order(partitions: int, rows: int, columns: int) -> None:
    codes = torch.randint(-128, 128, (partitions * rows, columns, 1), dtype=torch.int8)
    expected = []
    for part in codes[..., 0].view(torch.uint8).chunk(partitions):
        for some_columns in part.split(16, dim=1):
            expected += [block.T.flatten() for block in some_columns.split(256)]
    assert torch.equal(packed_codes(codes, 8, partitions), torch.cat(expected))
    assert torch.equal(packed_codes(codes, 3, partitions), torch.cat(expected) & 7)
