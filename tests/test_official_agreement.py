"""Agreement with the official inference package aqlm 1.1.7, an independent witness of what the format means.

Its CPU kernels race with more than one thread (10 % error), so they run with one, in float32.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from aqlm_tensor.scheme import AQLMScheme
from aqlm_tensor.tensor import AQLMTensor
from tests.strategies import random_parts

numba = pytest.importorskip("numba", reason="the official CPU kernels need numba")
aqlm = pytest.importorskip("aqlm", reason="the witness aqlm==1.1.7 is not installed")
official_utils = pytest.importorskip("aqlm.utils")

pytestmark = pytest.mark.filterwarnings("ignore::numba.core.errors.NumbaPerformanceWarning")


@pytest.fixture(autouse=True)
def _single_threaded() -> Iterator[None]:
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    yield
    numba.set_num_threads(before)


def _official(scheme: AQLMScheme, w: AQLMTensor, bias: torch.Tensor) -> Any:
    """The official layer on copies of the tensors (its first forward permutes its codes)."""
    layer = aqlm.QuantizedLinear(
        w.shape[1],
        w.shape[0],
        scheme.in_group_size,
        scheme.out_group_size,
        scheme.num_codebooks,
        scheme.nbits_per_codebook,
        bias=True,
        dtype=torch.float32,
    )
    state = {"codes": w.codes, "codebooks": w.codebooks, "scales": w.scales, "bias": bias}
    layer.load_state_dict({name: tensor.clone() for name, tensor in state.items()})
    return layer


@pytest.mark.parametrize("text", ["1x8g8", "2x8g8", "4x8g8", "8x8g32"])
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_official_layers_compute_the_same(text: str, rows: int) -> None:
    scheme = AQLMScheme.parse(text)
    w, bias, x = AQLMTensor(*random_parts(scheme, 48, 256)), torch.randn(48), torch.randn(rows, 256)
    layer = _official(scheme, w, bias)
    stored = AQLMTensor(layer.codes.data, layer.codebooks.data, layer.scales.data)  # before its first forward
    ours, theirs = F.linear(x, w, bias), layer(x)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5
    assert torch.equal(stored.dequantize(), w.dequantize())


@pytest.mark.parametrize("text", ["1x16g8", "1x16g16", "2x8g8", "3x12g8", "8x8g32", "2x4g8o2"])
def test_official_dequantization_is_the_same(text: str) -> None:
    scheme = AQLMScheme.parse(text)
    w = AQLMTensor(*random_parts(scheme, 64, 256))
    indices = official_utils.unpack_int_data(w.codes, scheme.nbits_per_codebook)
    theirs = official_utils._dequantize_weight(indices, w.codebooks, w.scales)
    torch.testing.assert_close(w.dequantize(), theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("nbits", [2, 7, 8, 12, 16])
def test_codes_are_packed_the_same_way(nbits: int) -> None:
    from aqlm_tensor.codes import codes_to_indices, indices_to_codes

    indices = torch.randint(0, 1 << nbits, (5, 6, 2))
    packed = official_utils.pack_int_data(indices.clone(), nbits)
    assert torch.equal(packed, indices_to_codes(indices, nbits))
    assert packed.dtype == indices_to_codes(indices, nbits).dtype
    assert torch.equal(codes_to_indices(packed, nbits), official_utils.unpack_int_data(packed.clone(), nbits))
