"""Compile, cache and launch CUDA C++ kernels without a CUDA toolkit.

NVIDIA's NVRTC compiles a kernel variant at its first use, through `cuda.core`, to machine code for the device at hand;
the result is kept on disk, so that later processes only load it. Compared with a compiled torch extension this needs
neither nvcc nor a C++ toolchain and ships no binaries per torch version; the price is one to three seconds at the first
use of each variant on a machine. Nothing here runs at import.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import struct
import tempfile
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aqlm_tensor.kernels.crossovers import cache_folder
from aqlm_tensor.kernels.registry import Problem

__all__ = [
    "Kernel",
    "compile_source",
    "cubin",
    "device_arch",
    "device_limits",
    "empty_product",
    "load_kernel",
    "on_device",
    "prepared",
    "why_not_groups_of_8",
    "why_not_on",
]

_SOURCES = Path(__file__).parent / "cuda"
_MIN_CAPABILITY = (7, 5)
_DEFAULT_SHARED_BYTES = 48 * 1024


def why_not_on(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why CUDA kernels for `dtype` cannot run on `device`, with the remedy; None if they can."""
    if device.type != "cuda":
        return f"runs on cuda, not on {device.type}"
    unavailable = _why_unavailable()
    if unavailable:
        return unavailable
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < _MIN_CAPABILITY:
        return f"needs compute capability 7.5 or later, this GPU has {major}.{minor}"
    if dtype == torch.bfloat16 and major < 8:
        return f"needs compute capability 8.0 for bfloat16, this GPU has {major}.{minor}; use float16"
    return None


def why_not_groups_of_8(
    problem: Problem, num_codebooks: Collection[int], dtypes: Collection[torch.dtype], nbits: int = 8
) -> str | None:
    """Why a kernel for codes of at most `nbits` bits over groups of 8 inputs cannot run a problem; None if it can.

    Args:
        problem: what is to be computed.
        num_codebooks: the numbers of codebooks the kernel has.
        dtypes: the dtypes it computes in.
        nbits: the most bits of a code.
    """
    scheme = problem.scheme
    if scheme.in_group_size != 8 or scheme.out_group_size != 1:
        return f"needs groups of 8 inputs and 1 output, not {scheme}"
    if scheme.num_codebooks not in num_codebooks or scheme.nbits_per_codebook > nbits:
        return f"needs {', '.join(map(str, num_codebooks))} codebooks of at most {nbits} bits, not {scheme}"
    if problem.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"computes in {names}, not {problem.dtype}"
    return why_not_on(problem.device, problem.dtype)


@functools.cache
def _why_unavailable() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device is available to torch"
    if torch.version.hip is not None:
        return "this torch is built for ROCm; the CUDA kernels need an NVIDIA GPU"
    try:
        import cuda.bindings.driver
        import cuda.core  # noqa: F401
    except ImportError as error:
        return f"the package cuda-core with its CUDA bindings is missing ({error}); install aqlm-tensor[cuda]"
    return None


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """`torch.cuda.device(device)`, without its cost where that is the current device already."""
    if torch._C._cuda_getDevice() == device.index:  # CUDA is initialised: there is a tensor on the device
        return _NOTHING
    return torch.cuda.device(device)


_NOTHING = contextlib.nullcontext()


@functools.cache
def device_arch(index: int) -> str:
    """The architecture name NVRTC compiles for on CUDA device `index`, for example ``"sm_80"``.

    For Hopper it is ``"sm_90a"``, without which its warpgroup instructions do not compile.
    """
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")


@functools.cache
def device_limits(index: int) -> tuple[int, int]:
    """Multiprocessors of CUDA device `index`, and the most shared memory a block can have there, in bytes."""
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin


def empty_product(x: Tensor, codes: Tensor, bias: Tensor | None) -> tuple[Tensor, bool]:
    """Where the product of x and a weight goes, and whether it is there already: it has no outputs, or no inputs.

    Returns:
        [tokens, out_features] in x's dtype, and True if no kernel need run.
    """
    out = x.new_empty(x.shape[0], codes.shape[0])
    if out.numel() and codes.numel():
        return out, False
    return (out.zero_() if bias is None else out.copy_(bias.expand_as(out))), True


def prepared(
    x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The operands of a linear op in layouts the kernels read; the same tensors if they already are.

    Rows of x start at multiples of 16 bytes, rows of codes are contiguous but may be farther apart, the rest is
    contiguous and the codebooks are aligned to 16 bytes. Weights usually are all that; a slice may have to be copied.
    """
    if (
        not (x.data_ptr() | codebooks.data_ptr() | x.stride(0) * x.element_size()) & 15
        and codes.is_contiguous()
        and codebooks.is_contiguous()
        and scales.is_contiguous()
        and x.stride(1) == 1
        and (bias is None or bias.is_contiguous())
    ):
        return x, codes, codebooks, scales, bias
    if x.stride(1) != 1 or x.stride(0) * x.element_size() % 16 or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    if codes.stride(2) != 1 or codes.stride(1) != codes.shape[2]:
        codes = codes.contiguous()
    if not codebooks.is_contiguous() or codebooks.data_ptr() % 16:
        codebooks = codebooks.clone(memory_format=torch.contiguous_format)
    return x, codes, codebooks, scales.contiguous(), None if bias is None else bias.contiguous()


def compile_source(source: str, defines: Iterable[tuple[str, int]], arch: str) -> bytes:
    """Compile ``cuda/<source>`` to a CUBIN. Needs NVRTC but no GPU.

    Args:
        source: file name inside the package's ``cuda`` folder.
        defines: the variant's compile-time constants.
        arch: target such as ``"sm_90"``.

    Raises:
        RuntimeError: if NVRTC reports an error; the message holds its log.
    """
    from cuda.core import Program, ProgramOptions  # pyright: ignore[reportAttributeAccessIssue]

    options = ProgramOptions(
        name=source,
        arch=arch,
        std="c++17",
        define_macro=[(name, str(value)) for name, value in defines],
        include_path=[str(_SOURCES)],
    )
    return bytes(Program((_SOURCES / source).read_text(), "c++", options).compile("cubin").code)


@functools.cache
def _toolchain_digest() -> bytes:
    """Identifies everything that decides a compiled kernel besides its name, constants and target."""
    from cuda.bindings import nvrtc  # pyright: ignore[reportAttributeAccessIssue]

    digest = hashlib.sha256(repr(nvrtc.nvrtcVersion()).encode())
    for path in sorted(_SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.digest()


def cubin(source: str, defines: tuple[tuple[str, int], ...], arch: str) -> bytes:
    """`compile_source` through the cache on disk."""
    key = hashlib.sha256(_toolchain_digest() + repr((source, defines, arch)).encode()).hexdigest()
    path = cache_folder() / f"{Path(source).stem}-{arch}-{key[:32]}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        code = compile_source(source, defines, arch)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(code)
        os.replace(file.name, path)  # atomic: another process sees all of it or nothing
    except OSError:
        pass  # a read-only or full home only costs the next process a compilation
    return code


# A launch's arguments lie in one buffer, filled by one `pack_into`: ctypes structures would take twice as long as the
# launch. CUlaunchConfig (grid, block, dynamic shared memory, stream, attributes and their number), then the array of
# pointers to parameters with its one element, then the parameter. No launch waits for another's buffer: each takes one
# from the free list, whose `pop` and `append` are atomic, and gives it back.
_CONFIG = struct.Struct("=7I4xQQI4xQ")
_CONFIG_POINTERS = 56  # where the array of pointers starts
_MAX_PARAM_BYTES = 4096
_free_buffers: list[tuple[bytearray, Any, int]] = []

# CUlaunchAttribute: an id and a union of 64 bytes, here an int
_PROGRAMMATIC_STREAM_SERIALIZATION = 6
_OVERLAP = ctypes.create_string_buffer(struct.pack("=iii60x", _PROGRAMMATIC_STREAM_SERIALIZATION, 0, 1), 72)
_OVERLAP_ADDRESS = ctypes.addressof(_OVERLAP)


def _new_buffer() -> tuple[bytearray, Any, int]:
    """A buffer, what keeps it at its place, and its address."""
    buffer = bytearray(_CONFIG.size + _MAX_PARAM_BYTES)
    pinned = (ctypes.c_char * len(buffer)).from_buffer(buffer)
    return buffer, pinned, ctypes.addressof(pinned)


@functools.cache
def _launcher() -> Any:
    """The driver's cuLaunchKernelEx. Called through ctypes: it costs a fraction of what the Python bindings do."""
    driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    driver.cuLaunchKernelEx.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    return driver.cuLaunchKernelEx


@dataclass(frozen=True, eq=False)
class Kernel:
    """One compiled kernel on one device.

    Attributes:
        name: for messages.
        function: the driver's handle.
        module: keeps the loaded code alive.
        index: the CUDA device.
        can_overlap: whether the device has programmatic dependent launch.
    """

    name: str
    function: int
    module: Any
    index: int
    can_overlap: bool

    def launch(
        self,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        params: bytes,
        *,
        overlap: bool = False,
    ) -> None:
        """Start the kernel on torch's current stream of its device, which must be the current device.

        Args:
            grid: blocks in x, y and z.
            threads: threads per block.
            shared_bytes: dynamic shared memory per block.
            params: the kernel's one by-value parameter.
            overlap: the kernel may start before the one ahead of it in the stream has ended, and waits for it itself
                (programmatic dependent launch; needs compute capability 9.0, elsewhere it is ignored).

        Raises:
            RuntimeError: if the driver refuses the launch.
        """
        attributes = _OVERLAP_ADDRESS if overlap and self.can_overlap else 0
        stream = torch._C._cuda_getCurrentRawStream(self.index)
        try:
            taken = _free_buffers.pop()
        except IndexError:
            taken = _new_buffer()
        buffer, _, address = taken
        _CONFIG.pack_into(
            *(buffer, 0, *grid, threads, 1, 1, shared_bytes, stream, attributes, 1 if attributes else 0),
            address + _CONFIG.size,
        )
        buffer[_CONFIG.size : _CONFIG.size + len(params)] = params
        status = _launcher()(address, self.function, address + _CONFIG_POINTERS, None)
        _free_buffers.append(taken)
        if status:
            raise RuntimeError(
                f"launching the CUDA kernel {self.name} failed with error {status} of the CUDA driver (grid {grid}, "
                f"{threads} threads, {shared_bytes} bytes of shared memory)"
            )


@functools.cache
def load_kernel(
    source: str, entry: str, defines: tuple[tuple[str, int], ...], index: int, shared_bytes: int = 0
) -> Kernel:
    """The kernel `entry` of ``cuda/<source>``, compiled with `defines` for device `index` (cached).

    Args:
        source: file name inside the package's ``cuda`` folder.
        entry: name of the ``extern "C"`` kernel.
        defines: compile-time constants.
        index: CUDA device.
        shared_bytes: the most dynamic shared memory a launch will ask for.

    Raises:
        RuntimeError: while a CUDA graph is being captured, since loading code would break the capture.
    """
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"the CUDA kernel {entry} is not loaded yet and cannot be loaded while a CUDA graph is captured: "
            "run the layer once with the same number of rows before the capture"
        )
    from cuda.bindings import driver  # pyright: ignore[reportAttributeAccessIssue]
    from cuda.core import Device, ObjectCode  # pyright: ignore[reportAttributeAccessIssue]

    with torch.cuda.device(index):
        torch.cuda.current_stream()
        Device(index).set_current()
        module = ObjectCode.from_cubin(cubin(source, defines, device_arch(index)))
        kernel = module.get_kernel(entry)
        if shared_bytes > _DEFAULT_SHARED_BYTES:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            (status,) = driver.cuKernelSetAttribute(attribute, shared_bytes, driver.CUkernel(int(kernel.handle)), index)
            if status != driver.CUresult.CUDA_SUCCESS:
                raise RuntimeError(f"{entry} cannot have {shared_bytes} bytes of shared memory: {status.name}")
        return Kernel(entry, int(kernel.handle), module, index, torch.cuda.get_device_capability(index) >= (9, 0))
