"""What is handed to the driver for a tensor map, seen by a function that stands in for it; needs no GPU."""

import ctypes
from typing import Any

import pytest
import torch

from aqlm_tensor.kernels import cuda_tensor_map
from aqlm_tensor.kernels.cuda_linear_launch import operand_maps
from aqlm_tensor.kernels.cuda_tensor_map import SWIZZLE_64, SWIZZLE_128, tensor_map


class Encoder:
    """Takes the place of cuTensorMapEncodeTiled, and writes its count of calls to the whole map."""

    def __init__(self, status: int = 0) -> None:
        self.status = status
        self.seen: list[tuple] = []

    def __call__(self, *args: Any) -> int:
        to, kind, rank, address, sizes, strides, box, steps, interleave, swizzle, _, fill = args
        assert to % 64 == 0, "the driver wants maps at multiples of 64 bytes"
        self.seen.append((kind, rank, address, *sizes, *strides, *box, *steps, interleave, swizzle, fill))
        ctypes.memset(to, len(self.seen), 128)
        return self.status


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> Encoder:
    encoder = Encoder()
    tensor_map.cache_clear()
    monkeypatch.setattr(cuda_tensor_map, "_encoder", lambda: encoder)
    return encoder


def test_tensor_map(encoder: Encoder) -> None:
    first = tensor_map(4096, 2, (7, 640), 2048, (8, 64), SWIZZLE_128)
    assert first == bytes([1] * 128)
    assert tensor_map(4096, 2, (7, 640), 2048, (8, 64), SWIZZLE_128) is first
    assert tensor_map(4096, 1, (7, 640), 2048, (8, 64), SWIZZLE_64) == bytes([2] * 128)
    assert encoder.seen == [
        (1, 2, 4096, 640, 7, 2048, 64, 8, 1, 1, 0, 3, 0),
        (0, 2, 4096, 640, 7, 2048, 64, 8, 1, 1, 0, 2, 0),
    ]


def test_a_refused_map_is_an_error(encoder: Encoder) -> None:
    encoder.status = 1
    with pytest.raises(RuntimeError, match=r"refused a tensor map with error 1 \(address 0x1000"):
        tensor_map(4096, 2, (7, 640), 2048, (8, 64), SWIZZLE_128)


@pytest.mark.parametrize("rows", [1, 5])
def test_operand_maps(encoder: Encoder, rows: int) -> None:
    """Rows may be farther apart; of a single row the stride says nothing."""
    x = torch.empty(5, 2048, dtype=torch.bfloat16)[:rows, :1024]
    codes = torch.empty(300, 256, 2, dtype=torch.int8)[:, :128]
    assert operand_maps(x, codes, 2, 14, 128) == bytes([1] * 128 + [2] * 128)
    assert encoder.seen == [
        (0, 2, codes.data_ptr(), 256, 300, 512, 128, 224, 1, 1, 0, 3, 0),
        (1, 2, x.data_ptr(), 1024, rows, 2048 if rows == 1 else 4096, 64, 16, 1, 1, 0, 3, 0),
    ]
