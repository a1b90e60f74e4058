"""Which kernel runs: the table's order, forcing, recording, reasons and the one warning."""

import sys
import threading
import types
import warnings
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from aqlm_tensor.kernels import ops, reference, registry
from aqlm_tensor.kernels.registry import Kernel, Problem
from aqlm_tensor.scheme import AQLMScheme
from tests.strategies import random_parts

PROBLEM = Problem("linear", AQLMScheme(2, 8), 1, 64, 32, 1, torch.float32, torch.device("cpu"))
PARTS = random_parts("2x8g8", 32, 64)


def _stub(name: str, reason: str | None) -> Kernel:
    """A kernel that refuses with `reason`, or else runs the reference."""
    module = types.ModuleType(f"tests.kernels.stub_{name}")
    module.supports = lambda problem: reason  # type: ignore[attr-defined]
    for op in ("linear", "linear_input_grad", "dequantize"):
        setattr(module, op, getattr(reference, op))
    sys.modules[module.__name__] = module
    return Kernel(name, module.__name__)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Kernel, ...]]:
    """A registry of a kernel that refuses, one that runs, one for another device, one not installed, and torch."""
    kernels = (
        _stub("picky", "needs rows in multiples of 8"),
        Kernel("elsewhere", "tests.kernels.never_imported", device_types=("cuda", "xpu")),
        Kernel("absent", "tests.kernels.never_imported", requires=("no_such_package",), remedy="pip install x[y]"),
        _stub("good", None),
        Kernel("torch", "aqlm_tensor.kernels.reference", fast=False),
    )
    monkeypatch.setattr(registry, "KERNELS", kernels)
    monkeypatch.delenv(registry.ENV_VARIABLE, raising=False)
    registry.refresh()
    registry._warned.clear()
    yield kernels
    registry._warned.clear()


@pytest.fixture(autouse=True)
def _choose_anew_afterwards() -> Iterator[None]:
    yield
    registry.refresh()


def _ran(x: torch.Tensor | None = None) -> list[tuple[str, str]]:
    with registry.record() as ran:
        ops.linear(torch.ones(1, 64) if x is None else x, *PARTS, None)
    return [(op, name) for op, name in ran]


def _set_environment(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(registry.ENV_VARIABLE, name)
    registry.refresh()


@pytest.mark.usefixtures("table")
def test_the_first_able_kernel_runs() -> None:
    assert _ran() == [("linear", "good")]


@pytest.mark.usefixtures("table")
def test_explain_gives_every_reason() -> None:
    reasons = {kernel.name: reason for kernel, reason in registry.explain(PROBLEM)}
    assert reasons == {
        "picky": "needs rows in multiples of 8",
        "elsewhere": "runs on cuda and xpu, not on cpu",
        "absent": "needs no_such_package: pip install x[y]",
        "good": None,
        "torch": None,
    }


@pytest.mark.usefixtures("table")
def test_forcing() -> None:
    with registry.force_kernel("torch"):
        assert _ran() == [("linear", "torch")]
        with registry.force_kernel("good"):
            assert _ran() == [("linear", "good")]
        assert _ran() == [("linear", "torch")]
    assert _ran() == [("linear", "good")]


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("picky", "needs rows in multiples of 8"),
        ("elsewhere", "runs on cuda and xpu, not on cpu"),
        ("absent", r"needs no_such_package: pip install x\[y\]"),
    ],
)
def test_a_forced_kernel_that_cannot_run_is_an_error(name: str, reason: str) -> None:
    message = f"kernel '{name}' was forced but cannot run linear of 2x8g8: {reason}"
    with registry.force_kernel(name), pytest.raises(ValueError, match=message):
        _ran()
    assert _ran() == [("linear", "good")]


@pytest.mark.usefixtures("table")
def test_the_environment_forces_too(monkeypatch: pytest.MonkeyPatch) -> None:
    _set_environment(monkeypatch, "torch")
    assert _ran() == [("linear", "torch")]
    with registry.force_kernel("good"):
        assert _ran() == [("linear", "good")], "the narrower wish wins"
    _set_environment(monkeypatch, "")
    assert _ran() == [("linear", "good")]
    _set_environment(monkeypatch, "picky")
    with pytest.raises(ValueError, match="needs rows in multiples of 8"):
        _ran()


@pytest.fixture
def lossy(table: tuple[Kernel, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same registry with a kernel in front that an option allows."""
    kernel = replace(_stub("lossy", None), option="rounding")
    monkeypatch.setattr(registry, "KERNELS", (kernel, *table))
    monkeypatch.setattr(registry, "OPTIONS", {"rounding": "rounds", "other": "does something else"})
    monkeypatch.delenv(registry.ALLOW_VARIABLE, raising=False)
    registry.refresh()


@pytest.mark.usefixtures("lossy")
def test_an_option_is_allowed_in_its_block_only() -> None:
    assert _ran() == [("linear", "good")]
    assert {kernel.name: reason for kernel, reason in registry.explain(PROBLEM)}["lossy"] == (
        "rounds: set AQLM_TENSOR_ALLOW=rounding to allow it"
    )
    with registry.allow("rounding"):
        assert _ran() == [("linear", "lossy")]
        assert registry.explain(PROBLEM)[0][1] is None
        with registry.allow("other"):
            assert _ran() == [("linear", "good")]
        with registry.force_kernel("torch"):
            assert _ran() == [("linear", "torch")]
        seen: list[list[tuple[str, str]]] = []
        thread = threading.Thread(target=lambda: seen.append(_ran()))
        thread.start()
        thread.join()
        assert seen == [[("linear", "good")]]
    assert _ran() == [("linear", "good")]
    with registry.force_kernel("lossy"):
        assert _ran() == [("linear", "lossy")], "who names a kernel allows it"


@pytest.mark.usefixtures("lossy")
def test_the_environment_allows_options_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(registry.ALLOW_VARIABLE, "other, rounding")
    registry.refresh()
    assert _ran() == [("linear", "lossy")]
    with registry.allow():
        assert _ran() == [("linear", "good")], "the narrower wish wins"
    monkeypatch.setenv(registry.ALLOW_VARIABLE, "roundin")
    registry.refresh()
    with pytest.raises(ValueError, match="no option is named 'roundin': choose of rounding, other"):
        _ran()
    with pytest.raises(ValueError, match="no option is named 'faster'"), registry.allow("faster"):
        pass


@pytest.mark.usefixtures("lossy")
def test_an_allowed_option_goes_before_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.crossovers, "fastest", lambda *_: ("good", "here"))
    registry.refresh()
    assert _ran() == [("linear", "good")]
    with registry.allow("rounding"):
        assert _ran() == [("linear", "lossy")]


def test_every_option_belongs_to_a_kernel() -> None:
    assert {kernel.option for kernel in registry.KERNELS if kernel.option} == registry.OPTIONS.keys()


def test_unknown_names_list_the_known(monkeypatch: pytest.MonkeyPatch) -> None:
    known = ", ".join(kernel.name for kernel in registry.KERNELS)
    with (
        pytest.raises(ValueError, match=f"no kernel is named 'trition': choose one of {known}"),
        registry.force_kernel("trition"),
    ):
        pass
    _set_environment(monkeypatch, "trition")
    with pytest.raises(ValueError, match="no kernel is named 'trition'"):
        ops.dequantize(*PARTS)


def test_forcing_and_recording_stay_in_their_thread(table: tuple[Kernel, ...]) -> None:
    seen: list[list[tuple[str, str]]] = []
    with registry.force_kernel("torch"), registry.record() as ran:
        thread = threading.Thread(target=lambda: seen.append(_ran()))
        thread.start()
        thread.join()
    assert seen == [[("linear", "good")]]
    assert ran == []


def test_the_slow_kernel_warns_once_and_says_why(table: tuple[Kernel, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "KERNELS", tuple(kernel for kernel in table if kernel.name != "good"))
    with pytest.warns(UserWarning, match="no fast AQLM kernel for scheme 2x8g8 on cpu") as caught:
        assert _ran() == [("linear", "torch")]
    text = str(caught[0].message)
    for reason in ("picky needs rows in multiples of 8", "absent needs no_such_package", "--explain"):
        assert reason in text
    assert "elsewhere" not in text, "a kernel for other devices is no reason"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _ran(torch.ones(5, 64)) == [("linear", "torch")]
    with pytest.warns(UserWarning, match="1x8g8"):
        ops.dequantize(*random_parts("1x8g8", 32, 64))
    with warnings.catch_warnings(), registry.force_kernel("torch"):
        warnings.simplefilter("error")
        ops.dequantize(*random_parts("3x8g8", 32, 64))


def test_no_kernel_at_all_names_every_reason(table: tuple[Kernel, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "KERNELS", table[:3])
    with pytest.raises(ValueError, match="no kernel can run .*picky needs rows.*elsewhere runs on.*absent needs"):
        _ran()


def test_invalidate_reaches_loaded_kernels_only(table: tuple[Kernel, ...]) -> None:
    forgotten: list[torch.Tensor] = []
    sys.modules[table[3].module].invalidate = forgotten.append  # type: ignore[attr-defined]
    registry.invalidate(PARTS[0])
    assert forgotten == [PARTS[0]]
    assert "tests.kernels.never_imported" not in sys.modules


@pytest.mark.parametrize("kernel", registry.KERNELS, ids=lambda kernel: kernel.name)
def test_real_kernels_answer_for_every_op(kernel: Kernel) -> None:
    for device in ("cpu", "cuda", "meta"):
        for op in ("linear", "linear_input_grad", "dequantize"):
            reason = kernel.why_not(replace(PROBLEM, op=op, device=torch.device(device)))
            assert reason is None or reason.strip()
    if kernel.why_not(PROBLEM) is None:
        for op in ("linear", "linear_input_grad", "dequantize"):
            assert callable(kernel.function(op))


def test_the_last_kernel_runs_everything() -> None:
    last = registry.KERNELS[-1]
    assert last.name == "torch"
    assert not last.fast
    assert all(kernel.fast for kernel in registry.KERNELS[:-1])
    assert len({kernel.name for kernel in registry.KERNELS}) == len(registry.KERNELS)
