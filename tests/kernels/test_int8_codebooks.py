"""Copies of codebooks in 8-bit integers: their error, and when they are made, shared, renewed and dropped."""

import gc
import weakref

import pytest
import torch

from aqlm_tensor.kernels import cuda_gather_gemm, cuda_int8_codebook, int8_codebooks
from aqlm_tensor.kernels.int8_codebooks import quantized, restored
from aqlm_tensor.kernels.registry import Problem
from aqlm_tensor.scheme import AQLMScheme


def _codebooks(*lead: int, size: int = 512, group: int = 8, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(*lead, 1, size, 1, group, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("lead", [(), (3,)], ids=["one", "partitioned"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_entries_are_the_nearest_multiples(lead: tuple[int, ...], dtype: torch.dtype) -> None:
    books = _codebooks(*lead, group=16, dtype=dtype)
    copy = quantized(books)
    assert copy.entries.shape == (*(lead or (1,)), 8, 512, 2)
    error = (restored(copy).view_as(books) - books.double()).abs()
    half = copy.scales.double().repeat_interleave(2, -1) / 2
    assert (error <= half.view(-1, 1, 1, 1, 16) * (1 + 1e-4)).all()  # a tie may fall either way
    largest = books.double().view(-1, 512, 8, 2).abs().amax(dim=(1, 3))
    torch.testing.assert_close(copy.scales.double(), largest / 127, rtol=1e-6, atol=0)
    assert (copy.entries.abs().amax(dim=(2, 3)) == 127).all()


def test_error_of_a_gaussian_codebook_is_what_is_documented() -> None:
    books = _codebooks(size=65536)
    error = restored(quantized(books))[0] - books.double()
    assert 0.008 < float(error.norm() / books.double().norm()) < 0.012


def test_multiples_of_a_power_of_two_are_kept_exactly() -> None:
    books = torch.randint(-127, 128, (1, 512, 1, 8), generator=torch.Generator().manual_seed(0))
    books[:, 0] = 127
    books = books.to(torch.bfloat16) * 2.0**-9
    assert torch.equal(restored(quantized(books))[0], books.double())


def test_zeros() -> None:
    books = _codebooks()
    books[..., 2:4] = 0
    copy = quantized(books)
    assert not restored(copy)[..., 2:4].any()
    assert copy.scales.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_entries_without_a_number_are_refused(bad: float) -> None:
    books = _codebooks()
    books[0, 3, 0, 1] = bad
    with pytest.raises(ValueError, match="NaN or infinite entries"):
        quantized(books)


def test_one_copy_for_all_views_of_a_codebook() -> None:
    books = _codebooks()
    assert quantized(books) is quantized(books.detach()) is quantized(books.view_as(books))
    joint = _codebooks(2)
    assert quantized(joint[1]) is not quantized(joint[0])
    assert torch.equal(quantized(joint[1]).entries[0], quantized(joint).entries[1])


def test_changed_codebooks_are_rounded_again_in_the_same_memory() -> None:
    books = _codebooks()
    copy = quantized(books)
    where = copy.entries.data_ptr(), copy.scales.data_ptr()
    books.mul_(2)
    assert quantized(books) is copy
    assert (copy.entries.data_ptr(), copy.scales.data_ptr()) == where
    torch.testing.assert_close(restored(copy)[0], books.double(), rtol=0, atol=float(copy.scales.max()) * 0.51)


def test_writes_behind_torchs_back_need_invalidate() -> None:
    books = _codebooks()
    before = restored(quantized(books))
    books.data.mul_(2)
    assert torch.equal(restored(quantized(books)), before)
    int8_codebooks.invalidate(books[:, :7])  # any view will do
    torch.testing.assert_close(restored(quantized(books)), 2 * before)


def test_inference_tensors_count_as_immutable() -> None:
    with torch.inference_mode():
        books = _codebooks()
        assert quantized(books) is quantized(books)


def test_copies_live_as_long_as_the_codebooks() -> None:
    books = _codebooks()
    copy = weakref.ref(quantized(books).entries)
    del books
    gc.collect()
    assert copy() is None


def test_the_kernel_gives_way_where_gathering_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    def gives_way(scheme: str, rows: int) -> bool:
        parsed = AQLMScheme.parse(scheme)
        problem = Problem("linear", parsed, rows, 8192, 8192, 1, torch.bfloat16, torch.device("cuda", 0))
        return cuda_int8_codebook.slower_than_next(problem) is not None

    monkeypatch.setattr(cuda_gather_gemm, "supports", lambda _: None)
    assert gives_way("1x16g16", 64)
    assert not gives_way("1x16g16", 16)
    assert not gives_way("1x16g8", 64)
    monkeypatch.setattr(cuda_gather_gemm, "supports", lambda _: "needs another GPU")
    assert not gives_way("1x16g16", 64)
