"""AQLMScheme: reading, printing, checking, counting bits."""

import math
from dataclasses import FrozenInstanceError

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aqlm_tensor.scheme import AQLMScheme
from tests.strategies import random_parts, schemes


@given(scheme=schemes())
def test_printing_and_parsing_are_inverse(scheme: AQLMScheme) -> None:
    assert AQLMScheme.parse(str(scheme)) == scheme
    assert AQLMScheme.parse(scheme) is scheme
    assert ("o" in str(scheme)) == (scheme.out_group_size != 1)
    assert hash(AQLMScheme.parse(str(scheme))) == hash(scheme)


@pytest.mark.parametrize(
    ("text", "fields", "printed"),
    [
        ("2x8", (2, 8, 8, 1), "2x8g8"),
        ("1x16g16", (1, 16, 16, 1), "1x16g16"),
        ("8x8g32o1", (8, 8, 32, 1), "8x8g32"),
        ("3x12o2", (3, 12, 8, 2), "3x12g8o2"),
        ("1x1g1o1", (1, 1, 1, 1), "1x1g1"),
    ],
)
def test_parse(text: str, fields: tuple[int, ...], printed: str) -> None:
    scheme = AQLMScheme.parse(text)
    assert scheme == AQLMScheme(*fields)
    assert str(scheme) == printed


@pytest.mark.parametrize(
    "text",
    ["", "2", "x8", "2x", "2x8g", "2x8o", "2x8g8o", "2X8", " 2x8", "2x8 ", "2x8\n", "2x8o2g8", "-2x8", "2x-8", "2.0x8",
     "2x8g8g8", "aqlm_2x8", "2x8g8o1x", "\uff12x8"],
)  # fmt: skip
def test_unknown_schemes_show_the_form(text: str) -> None:
    with pytest.raises(ValueError, match="unknown scheme .*write KxN, KxNgG or KxNgGoH.*for example '2x8'"):
        AQLMScheme.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0x8", "num_codebooks must be at least 1, got 0"),
        ("2x0", "nbits_per_codebook must be at least 1, got 0"),
        ("2x17", "nbits_per_codebook must be 1 to 16 .*got 17"),
        ("2x8g0", "in_group_size must be at least 1, got 0"),
        ("2x8g8o0", "out_group_size must be at least 1, got 0"),
    ],
)
def test_numbers_out_of_range_are_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"unknown scheme '{text}': {message}"):
        AQLMScheme.parse(text)


@pytest.mark.parametrize("value", [2.0, "2", None, True])
def test_fields_are_ints(value: object) -> None:
    with pytest.raises(TypeError, match="num_codebooks must be an int, got"):
        AQLMScheme(value, 8)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("value", [None, 28, 2.8, b"2x8"])
def test_only_strings_are_parsed(value: object) -> None:
    with pytest.raises(TypeError, match="a scheme is a string such as '2x8g8' or an AQLMScheme, got"):
        AQLMScheme.parse(value)  # pyright: ignore[reportArgumentType]


def test_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        AQLMScheme(2, 8).num_codebooks = 3  # pyright: ignore[reportAttributeAccessIssue]


@given(scheme=schemes(), groups=st.tuples(st.integers(0, 20), st.integers(0, 20)), partitions=st.sampled_from([1, 2]))
def test_counts_what_is_stored(scheme: AQLMScheme, groups: tuple[int, int], partitions: int) -> None:
    out_features = groups[0] * partitions * scheme.out_group_size
    in_features = groups[1] * scheme.in_group_size
    codes, codebooks, scales = random_parts(
        scheme, out_features, in_features, dtype=torch.float16, partitions=0 if partitions == 1 else partitions
    )
    stored = 8 * sum(part.numel() * part.element_size() for part in (codes, codebooks, scales))
    assert scheme.stored_bits(out_features, in_features, partitions=partitions) == stored
    bits = scheme.bits_per_weight(out_features, in_features, partitions=partitions)
    if out_features * in_features:
        assert bits == stored / (out_features * in_features)
    else:
        assert math.isnan(bits)
    assert codes.shape == scheme.codes_shape(out_features, in_features)
    assert codes.dtype == scheme.codes_dtype
    assert codebooks.shape[-4:] == scheme.codebooks_shape


def test_known_sizes() -> None:
    # 4096 x 4096 of 2x8g8: 2 bits of codes, 2*256*8*16/4096^2 of codebooks, 16/4096 of scales
    assert AQLMScheme(2, 8).bits_per_weight(4096, 4096) == pytest.approx(2.0078125)
    assert AQLMScheme(1, 16).bits_per_weight(4096, 4096) == pytest.approx(2 + 0.5 + 1 / 256)
    assert AQLMScheme(1, 12).bits_per_weight(4096, 4096) == pytest.approx(2 + 4096 * 8 * 16 / 4096**2 + 1 / 256)


def test_why_not() -> None:
    scheme = AQLMScheme(2, 8, 8, 2)
    assert scheme.why_not(4, 16) is None
    assert scheme.why_not(5, 16) == "out_features 5 is not a multiple of the scheme's out_group_size 2"
    assert scheme.why_not(4, 15) == "in_features 15 is not a multiple of the scheme's in_group_size 8"
