"""Stored codes and indices."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aqlm_tensor.codes import check_codes, codes_to_indices, indices_to_codes

NBITS = range(1, 17)


@pytest.mark.parametrize("nbits", NBITS)
def test_every_index_survives_storage(nbits: int) -> None:
    indices = torch.arange(1 << nbits)
    codes = indices_to_codes(indices, nbits)
    assert codes.dtype == (torch.int8 if nbits <= 8 else torch.int16)
    assert int(codes.min()) == -(1 << (nbits - 1))
    assert int(codes.max()) == (1 << (nbits - 1)) - 1
    assert torch.equal(codes_to_indices(codes, nbits), indices)
    check_codes(codes, nbits)
    assert torch.equal(indices, torch.arange(1 << nbits)), "the input was changed"


@pytest.mark.parametrize("nbits", NBITS)
def test_unsigned_storage_means_the_same(nbits: int) -> None:
    dtype = torch.int8 if nbits <= 8 else torch.int16
    indices = torch.arange(min(1 << nbits, torch.iinfo(dtype).max + 1))
    codes = indices.to(dtype)
    before = codes.clone()
    check_codes(codes, nbits)
    assert torch.equal(codes_to_indices(codes, nbits), indices)
    assert torch.equal(codes, before), "the input was changed"


def test_official_wrapping() -> None:
    # 12-bit codes wrap at 2048 inside int16, as the official converter writes them
    assert indices_to_codes(torch.tensor([0, 2047, 2048, 4095]), 12).tolist() == [0, 2047, -2048, -1]
    assert codes_to_indices(torch.tensor([-1, -2048, 4095], dtype=torch.int16), 12).tolist() == [4095, 2048, 4095]


@given(
    nbits=st.sampled_from([5, 7, 8, 9, 12, 16]),
    shape=st.lists(st.integers(0, 5), min_size=0, max_size=4),
    dtype=st.sampled_from([torch.int16, torch.int32, torch.int64]),
)
def test_shapes_dtypes_and_strides(nbits: int, shape: list[int], dtype: torch.dtype) -> None:
    limit = min(1 << nbits, torch.iinfo(dtype).max)
    indices = torch.randint(0, limit, [*shape, 2]).to(dtype)[..., 0]
    codes = indices_to_codes(indices, nbits)
    assert codes.shape == indices.shape
    back = codes_to_indices(codes, nbits, torch.int32)
    assert back.dtype == torch.int32
    assert torch.equal(back, indices.int())


@pytest.mark.parametrize("nbits", NBITS)
def test_indices_out_of_range(nbits: int) -> None:
    for bad in (-1, 1 << nbits):
        with pytest.raises(ValueError, match=rf"indices must lie in 0\.\.{(1 << nbits) - 1} for {nbits}-bit codes"):
            indices_to_codes(torch.tensor([0, bad]), nbits)


@pytest.mark.parametrize("nbits", [n for n in NBITS if n not in (8, 16)])
def test_codes_out_of_range(nbits: int) -> None:
    dtype = torch.int8 if nbits <= 8 else torch.int16
    bounds = (-(1 << (nbits - 1)) - 1, 1 << nbits)
    for bad in (bound for bound in bounds if torch.iinfo(dtype).min <= bound <= torch.iinfo(dtype).max):
        with pytest.raises(ValueError, match="codes out of range: found .* were they made for another scheme"):
            check_codes(torch.tensor([0, bad], dtype=dtype), nbits)


def test_empty_and_meta_are_accepted() -> None:
    empty = torch.empty(0, 3, 2, dtype=torch.int8)
    check_codes(empty, 4)
    assert codes_to_indices(empty, 4).shape == (0, 3, 2)
    assert indices_to_codes(empty.long(), 4).shape == (0, 3, 2)
    meta = torch.empty(2, 2, dtype=torch.int64, device="meta")
    assert indices_to_codes(meta, 4).is_meta
    check_codes(indices_to_codes(meta, 4), 4)
