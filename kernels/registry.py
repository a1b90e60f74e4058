"""Which kernel runs, and why: a static table of kernels, asked in order.

Every kernel is a module with the functions `supports(problem)`, `linear`, `linear_input_grad` and `dequantize` over
plain tensors (see `aqlm_tensor.kernels.reference` for their meaning), `invalidate(tensor)` if it caches anything, and
`slower_than_next(problem)` if a later row is known to be the better choice for some problems. The first kernel in
`KERNELS` that both questions pass runs, unless a table of measured crossovers (`aqlm_tensor.kernels.crossovers`) names
another for the device. The choice depends only on the `Problem` and that table, never on timing at run time, so the
same call gives the same bits in every process. `force_kernel` or the environment variable AQLM_TENSOR_KERNEL (read
at the first choice) names one kernel instead; if it cannot run the problem, that is an error with its reason.

A kernel that gives up accuracy for speed belongs to an option and runs only where that is allowed: `allow` or the
environment variable AQLM_TENSOR_ALLOW (names separated by commas) does, as does forcing the kernel. `OPTIONS` says what
each one costs. The choice is made when a product runs or is captured: torch.compile's graphs follow it, a CUDA graph
keeps the kernel it was captured with.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import Literal

import torch

from aqlm_tensor.kernels import crossovers
from aqlm_tensor.scheme import AQLMScheme

__all__ = [
    "ALLOW_VARIABLE",
    "ENV_VARIABLE",
    "KERNELS",
    "OPTIONS",
    "Kernel",
    "Op",
    "Problem",
    "allow",
    "explain",
    "force_kernel",
    "implementation",
    "invalidate",
    "record",
    "refresh",
]

ENV_VARIABLE = "AQLM_TENSOR_KERNEL"
ALLOW_VARIABLE = "AQLM_TENSOR_ALLOW"

# What trades accuracy for speed, and what it does to the result.
OPTIONS = {
    "int8_codebooks": "rounds the entries of a large codebook to 8-bit integers with one scale for two dimensions",
}

Op = Literal["linear", "linear_input_grad", "dequantize"]


@dataclass(frozen=True)
class Problem:
    """Everything a kernel may look at to say whether it can run.

    Attributes:
        op: the function asked for.
        scheme: codebooks and groups.
        rows: rows of the dense operand (tokens); 0 for dequantize.
        in_features: columns of the weight.
        out_features: rows of the weight.
        partitions: equal row partitions with codebooks of their own.
        dtype: dtype of x, codebooks, scales and the result.
        device: where all operands lie.
    """

    op: Op
    scheme: AQLMScheme
    rows: int
    in_features: int
    out_features: int
    partitions: int
    dtype: torch.dtype
    device: torch.device

    @functools.cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    def __hash__(self) -> int:
        """Computed once: a problem is the key under which its kernel is found at every call."""
        return self._hash


@dataclass(frozen=True)
class Kernel:
    """One row of the table.

    Attributes:
        name: what `force_kernel` and AQLM_TENSOR_KERNEL call it.
        module: the module with its functions, imported at first use.
        device_types: torch device types it serves; empty for all.
        requires: importable packages it needs.
        remedy: how to install them.
        fast: False for the fallback, which is right but slow and says so once.
        option: which of `OPTIONS` must be allowed before it is chosen; none for a kernel that obeys the contract.
    """

    name: str
    module: str
    device_types: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    remedy: str = ""
    fast: bool = True
    option: str = ""

    def serves(self, device: torch.device) -> bool:
        """Whether it runs on devices of that type."""
        return not self.device_types or device.type in self.device_types

    def why_not(self, problem: Problem) -> str | None:
        """The reason why this kernel cannot run the problem, or None if it can."""
        if not self.serves(problem.device):
            return f"runs on {' and '.join(self.device_types)}, not on {problem.device.type}"
        missing = [package for package in self.requires if not _installed(package)]
        if missing:
            return f"needs {' and '.join(missing)}: {self.remedy}"
        return importlib.import_module(self.module).supports(problem)

    def why_not_chosen(self, problem: Problem, allowed: frozenset[str] = frozenset()) -> str | None:
        """The reason why this kernel is passed over unless forced: it cannot run or may not, or another is faster."""
        reason = self.why_not(problem)
        if reason is not None:
            return reason
        if self.option and self.option not in allowed:
            return f"{OPTIONS[self.option]}: set {ALLOW_VARIABLE}={self.option} to allow it"
        slower = getattr(importlib.import_module(self.module), "slower_than_next", None)
        return None if slower is None else slower(problem)

    def function(self, op: Op) -> Callable[..., torch.Tensor]:
        """The kernel's implementation of an op."""
        return _function(self.module, op)


@functools.cache
def _function(module: str, op: Op) -> Callable[..., torch.Tensor]:
    return getattr(importlib.import_module(module), op)


def _cuda(name: str, option: str = "") -> Kernel:
    return Kernel(
        name,
        f"aqlm_tensor.kernels.{name}",
        device_types=("cuda",),
        requires=("cuda.core",),
        remedy="pip install 'aqlm-tensor[cuda]'",
        option=option,
    )


# Fastest first where several can run and nothing was measured; what needs an option, and was not measured therefore,
# before the others it would replace. Up to four tokens of 2x8g8: partial sums, then lookup; up to 64: lookup; beyond,
# the product with tiles of looked-up or gathered weights (Hopper) or decoding pieces for cuBLAS.
KERNELS: tuple[Kernel, ...] = (
    Kernel(
        "numba",
        "aqlm_tensor.kernels.numba_linear",
        device_types=("cpu",),
        requires=("numba",),
        remedy="pip install 'aqlm-tensor[cpu]'",
    ),
    _cuda("cuda_int8_codebook", option="int8_codebooks"),
    _cuda("cuda_partial_sums"),
    _cuda("cuda_lookup"),
    _cuda("cuda_sliced_codebook"),
    _cuda("cuda_lookup_gemm"),
    _cuda("cuda_gather_gemm"),
    _cuda("cuda_float32"),
    _cuda("cuda_dequantize"),
    Kernel(
        "triton",
        "aqlm_tensor.kernels.triton_linear",
        device_types=("cuda",),
        requires=("triton",),
        remedy="pip install triton",
    ),
    Kernel("torch", "aqlm_tensor.kernels.reference", fast=False),
)

_forced: ContextVar[str | None] = ContextVar("aqlm_tensor_forced_kernel", default=None)
_allowed: ContextVar[frozenset[str] | None] = ContextVar("aqlm_tensor_allowed_options", default=None)
_recorder: ContextVar[list[tuple[Op, str]] | None] = ContextVar("aqlm_tensor_kernel_recorder", default=None)


def implementation(problem: Problem) -> Callable[..., torch.Tensor]:
    """The function that runs a problem: the forced kernel's, or that of the first kernel able to.

    Raises:
        ValueError: if a kernel is forced that does not exist or cannot run the problem.
    """
    kernel = _choose(problem, _forced.get() or _environment(), _options())
    recorder = _recorder.get()
    if recorder is not None:
        recorder.append((problem.op, kernel.name))
    return kernel.function(problem.op)


@functools.cache
def _environment() -> str | None:
    """Read once: looking into os.environ takes longer than all the rest of a choice."""
    return os.environ.get(ENV_VARIABLE) or None


def _options() -> frozenset[str]:
    """The options allowed here."""
    allowed = _allowed.get()
    return _environment_options() if allowed is None else allowed


@functools.cache
def _environment_options() -> frozenset[str]:
    """Read once, too.

    Raises:
        ValueError: if an option does not exist.
    """
    return _known_options(name.strip() for name in os.environ.get(ALLOW_VARIABLE, "").split(",") if name.strip())


def _known_options(names: Iterable[str]) -> frozenset[str]:
    chosen = frozenset(names)
    for name in sorted(chosen - OPTIONS.keys()):
        raise ValueError(f"no option is named {name!r}: choose of {', '.join(OPTIONS)}")
    return chosen


@contextlib.contextmanager
def allow(*options: str) -> Iterator[None]:
    """Allow exactly these of `OPTIONS` inside the block, in this thread, whatever the environment allows.

    Raises:
        ValueError: if an option does not exist.
    """
    token = _allowed.set(_known_options(options))
    try:
        yield
    finally:
        _allowed.reset(token)


@contextlib.contextmanager
def force_kernel(name: str) -> Iterator[None]:
    """Run only the named kernel inside the block, in this thread; see `KERNELS` for the names.

    Raises:
        ValueError: at once if no kernel has that name, and by each op that the kernel cannot run.
    """
    _by_name(name)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


@contextlib.contextmanager
def record() -> Iterator[list[tuple[Op, str]]]:
    """Yield a list that receives (op, kernel name) for every op run inside the block, in this thread."""
    ran: list[tuple[Op, str]] = []
    token = _recorder.set(ran)
    try:
        yield ran
    finally:
        _recorder.reset(token)


def explain(problem: Problem) -> list[tuple[Kernel, str | None]]:
    """Every kernel of the table with the reason why it is passed over, or None; the first None is chosen."""
    return _explain(problem, _options())


def _explain(problem: Problem, allowed: frozenset[str]) -> list[tuple[Kernel, str | None]]:
    measured = _measured(problem)

    def reason(kernel: Kernel) -> str | None:
        if measured is None or kernel.option:
            return kernel.why_not_chosen(problem, allowed)
        fastest, source = measured
        if kernel is fastest:
            return None
        return kernel.why_not(problem) or f"slower than {fastest.name} as measured {source}"

    return [(kernel, reason(kernel)) for kernel in KERNELS]


def _measured(problem: Problem) -> tuple[Kernel, str] | None:
    """The kernel that was measured to be the fastest, if it can run the problem, and where that was."""
    if problem.op != "linear" or problem.rows < 1:
        return None
    weights = problem.in_features * problem.out_features
    found = crossovers.fastest(problem.scheme, problem.dtype, weights, problem.rows, problem.device)
    if found is None:
        return None
    name, source = found
    kernel = next((kernel for kernel in KERNELS if kernel.name == name), None)
    return None if kernel is None or kernel.why_not(problem) is not None else (kernel, source)


def invalidate(tensor: torch.Tensor) -> None:
    """Make every kernel forget what it derived from these codes or codebooks (repacked copies, tables)."""
    for kernel in KERNELS:
        module = sys.modules.get(kernel.module)  # a kernel that never ran has nothing to forget
        if module is not None and hasattr(module, "invalidate"):
            module.invalidate(tensor)


def refresh() -> None:
    """Choose anew from now on, after new crossovers were stored or the environment variable was changed."""
    crossovers.forget()
    _environment.cache_clear()
    _environment_options.cache_clear()
    _choose.cache_clear()


def _by_name(name: str) -> Kernel:
    for kernel in KERNELS:
        if kernel.name == name:
            return kernel
    raise ValueError(f"no kernel is named {name!r}: choose one of {', '.join(kernel.name for kernel in KERNELS)}")


@functools.lru_cache(maxsize=4096)
def _choose(problem: Problem, forced: str | None, allowed: frozenset[str]) -> Kernel:
    if forced is not None:
        kernel = _by_name(forced)
        reason = kernel.why_not(problem)
        if reason is not None:
            raise ValueError(f"kernel {forced!r} was forced but cannot run {problem.op} of {problem.scheme}: {reason}")
        return kernel
    reasons = []
    for kernel, reason in _explain(problem, allowed):
        if reason is None:
            if not kernel.fast:
                _warn_slow(problem, reasons)
            return kernel
        reasons.append((kernel, reason))
    raise ValueError(f"no kernel can run {problem}: {'; '.join(f'{kernel.name} {why}' for kernel, why in reasons)}")


_warned: set[tuple[AQLMScheme, str]] = set()


def _warn_slow(problem: Problem, reasons: list[tuple[Kernel, str]]) -> None:
    """Say once for each scheme and type of device that the slow kernel runs, and why."""
    key = (problem.scheme, problem.device.type)
    if key in _warned:
        return
    _warned.add(key)
    why = "; ".join(f"{kernel.name} {reason}" for kernel, reason in reasons if kernel.serves(problem.device))
    warnings.warn(
        f"no fast AQLM kernel for scheme {problem.scheme} on {problem.device.type} here ({why}); using the torch "
        "reference, which is slow. `aqlm-tensor kernels --explain` shows why.",
        stacklevel=2,
    )


@functools.lru_cache(maxsize=64)
def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # a dotted name whose parent package is missing
        return False
