"""Tensor maps, by which the copy engine of Hopper and later GPUs brings boxes of a matrix into shared memory.

One thread of a block asks for a whole box: no registers, no addresses, no loads of the others. A map holds the
matrix's address and shape; the driver encodes it, and a kernel takes it by value. Elements outside the matrix become
zeros.
"""

import ctypes
import functools
import os
from typing import Any

__all__ = ["SWIZZLE_64", "SWIZZLE_128", "tensor_map"]

# How rows of a box are permuted in shared memory so that reading a column of them meets no bank twice: 16-byte pieces
# exchange places within 64 bytes, by the address's bits 7 and 8, or within 128, by its bits 7 to 9.
SWIZZLE_64, SWIZZLE_128 = 2, 3

_BYTES, _ALIGNMENT = 128, 64  # of CUtensorMap
_ELEMENT_TYPES = {1: 0, 2: 1}  # CUtensorMapDataType of unsigned integers, by their bytes
_NO_INTERLEAVE, _L2_PROMOTION_128, _FILL_ZEROS = 0, 2, 0


@functools.cache
def _encoder() -> Any:
    """The driver's cuTensorMapEncodeTiled."""
    driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    encode = driver.cuTensorMapEncodeTiled
    encode.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint, *[ctypes.c_void_p] * 5, *[ctypes.c_int] * 4]
    return encode


@functools.lru_cache(maxsize=4096)
def tensor_map(
    address: int, element_bytes: int, shape: tuple[int, int], row_bytes: int, box: tuple[int, int], swizzle: int
) -> bytes:
    """The CUtensorMap of a matrix, 128 bytes (cached: encoding takes longer than a launch).

    Args:
        address: of the matrix in global memory, a multiple of 16.
        element_bytes: 1 or 2.
        shape: rows and columns.
        row_bytes: from one row to the next, a multiple of 16.
        box: rows and columns that one copy brings, at most 256 each.
        swizzle: `SWIZZLE_64` or `SWIZZLE_128`; a row of the box has that many bytes.

    Raises:
        RuntimeError: if the driver refuses the map.
    """
    buffer = ctypes.create_string_buffer(_BYTES + _ALIGNMENT)
    offset = -ctypes.addressof(buffer) % _ALIGNMENT
    sizes, strides = (ctypes.c_uint64 * 2)(shape[1], shape[0]), (ctypes.c_uint64 * 1)(row_bytes)
    box_sizes, element_strides = (ctypes.c_uint32 * 2)(box[1], box[0]), (ctypes.c_uint32 * 2)(1, 1)
    status = _encoder()(
        *(ctypes.addressof(buffer) + offset, _ELEMENT_TYPES[element_bytes], 2, address, sizes, strides),
        *(box_sizes, element_strides, _NO_INTERLEAVE, swizzle, _L2_PROMOTION_128, _FILL_ZEROS),
    )
    if status:
        raise RuntimeError(
            f"the CUDA driver refused a tensor map with error {status} (address {address:#x}, {element_bytes} bytes "
            f"an element, shape {shape}, {row_bytes} bytes a row, box {box}, swizzle {swizzle})"
        )
    return buffer.raw[offset : offset + _BYTES]
