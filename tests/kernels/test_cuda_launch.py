"""What a launch hands to the driver, seen by a function that stands in for it; needs no GPU."""

import ctypes
import struct
from collections.abc import Callable

import pytest
import torch

from aqlm_tensor.kernels import cuda_runtime

DriverFunction = Callable[[int, int, int, object], int]
_SIGNATURE = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)
STREAM = 0xABCD


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig of the driver API."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(ctypes.c_int)),
        ("num_attributes", ctypes.c_uint),
    )


def kernel(*, can_overlap: bool = True) -> cuda_runtime.Kernel:
    return cuda_runtime.Kernel("example", 77, None, 0, can_overlap)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Callable[[DriverFunction], None]:
    """Makes a function of the addresses of config, kernel and parameters stand in for the driver's."""
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM, raising=False)

    def install(function: DriverFunction) -> None:
        pointer = _SIGNATURE(function)
        monkeypatch.setattr(cuda_runtime, "_launcher", lambda: pointer)

    return install


@pytest.mark.parametrize(("overlap", "can_overlap"), [(False, True), (True, True), (True, False)])
def test_config_and_parameters(driver: Callable, overlap: bool, can_overlap: bool) -> None:
    params = struct.pack("=3Q2i", 1 << 40, 2, 3, -4, 5)
    seen = []

    def launched(config: int, function: int, pointers: int, extra: object) -> int:
        c = LaunchConfig.from_address(config)
        attribute = tuple(c.attributes[i] for i in range(3)) if c.num_attributes else ()
        seen.append((tuple(c.grid), tuple(c.block), c.shared_bytes, c.stream, c.num_attributes, attribute, function))
        seen.append(ctypes.string_at(ctypes.c_void_p.from_address(pointers).value or 0, len(params)))
        return 0

    driver(launched)
    kernel(can_overlap=can_overlap).launch((70000, 2, 3), 384, 200_000, params, overlap=overlap)
    expected = (1, (6, 0, 1)) if overlap and can_overlap else (0, ())  # programmatic stream serialization, allowed
    assert seen == [((70000, 2, 3), (384, 1, 1), 200_000, STREAM, *expected, 77), params]


def test_a_launch_within_a_launch_has_parameters_of_its_own(driver: Callable) -> None:
    """As a finalizer or another thread may start one at any time."""
    seen = []

    def launched(config: int, function: int, pointers: int, extra: object) -> int:
        if not seen:
            seen.append(b"outer")
            kernel().launch((1, 1, 1), 32, 0, b"inner")
        seen.append(ctypes.string_at(ctypes.c_void_p.from_address(pointers).value or 0, 5))
        return 0

    driver(launched)
    kernel().launch((1, 1, 1), 32, 0, b"outer")
    assert seen == [b"outer", b"inner", b"outer"]


def test_a_refused_launch_is_an_error(driver: Callable) -> None:
    driver(lambda *_: 719)
    with pytest.raises(RuntimeError, match=r"kernel example failed with error 719 .* \(grid \(1, 2, 3\), 64 threads"):
        kernel().launch((1, 2, 3), 64, 0, b"")
