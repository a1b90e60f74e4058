"""What the command line prints: results on stdout, progress and errors on stderr, and which errors end with which code.

On a terminal progress is a bar; elsewhere (a log file, CI) it is a plain line every few seconds.
"""

import contextlib
import datetime as dt
import json
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

__all__ = ["UsageError", "bar", "emit", "failures", "note", "phase", "print_json", "settings", "usage"]

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_AFTER_FIRST = 10.0  # of processes, in which torchrun sees that it is gone
_FAILURES = (ValueError, TypeError, KeyError, OSError, RuntimeError, MemoryError, NotImplementedError, ImportError)
_EXTRAS = {"transformers": "transformers", "accelerate": "transformers", "datasets": "data", "gguf": "demo"}


@dataclass
class Settings:
    """What the options before the command set.

    Attributes:
        debug: show the traceback of an error.
    """

    debug: bool = False


settings = Settings()
stdout = Console(soft_wrap=True, highlight=False)
stderr = Console(stderr=True, soft_wrap=True, highlight=False)


class UsageError(ValueError):
    """The user asked for something that cannot be: exit code 2, before any work."""


@contextlib.contextmanager
def usage() -> Iterator[None]:
    """Turn what checks of arguments raise into a UsageError."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(_message(error)) from error


@contextlib.contextmanager
def failures() -> Iterator[None]:
    """Run a command: errors become one red line and an exit code (2 usage, 1 failure, 130 Ctrl-C), or a traceback."""
    _quiet_libraries()
    try:
        yield
    except KeyboardInterrupt as error:
        stderr.print("[red]interrupted:[/] no output was written")
        for remark in _remarks(error):
            note(remark, style="yellow")
        raise typer.Exit(130) from None
    except _FAILURES as error:
        _tell_torchrun(error)
        stderr.quiet = False  # of several processes this may be the only one that knows
        if settings.debug:
            traceback.print_exc()
        stderr.print(Text("error: ", style="bold red").append(_message(error), style="red"))
        for remark in _remarks(error):
            note(remark, style="yellow")
        if isinstance(error, UsageError):
            raise typer.Exit(2) from None
        if not settings.debug:
            note("`aqlm-tensor --debug COMMAND ...` shows where it came from")
        raise typer.Exit(1) from None


def _tell_torchrun(error: BaseException) -> None:
    """Let torchrun, if it started this process, end with what went wrong instead of with how to find that out.

    It ends the other processes when one is gone. So that what all of them would say is said once, the first one goes
    first.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is None:
        return
    message = "\n".join([_message(error), *_remarks(error)])
    content = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}  # torchrun's form
    with contextlib.suppress(OSError):  # the disk may be full
        Path(file).write_text(json.dumps(content), encoding="utf-8")
    if os.environ.get("RANK", "0") != "0":
        time.sleep(_SECONDS_AFTER_FIRST)


def _remarks(error: BaseException) -> list[str]:
    """What was added to an error on its way up: where it happened, and what to do."""
    return getattr(error, "__notes__", [])


def _message(error: BaseException) -> str:
    """What an exception says; its type where it says nothing."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, KeyError):
        return f"missing key {error}"
    if isinstance(error, ModuleNotFoundError):
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        return str(error) if extra is None else f"{error}: pip install 'aqlm-tensor[{extra}]'"
    return str(error) or type(error).__name__


def _quiet_libraries() -> None:
    """Silence notes of torch, torchao and Transformers that no user of a command can act on."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported; our own bars tell more
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("torchao", "torch.utils._pytree", "aqlm_tensor.api"):  # the last repeats what `quantize` says
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.showwarning = _show_warning


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning):
        note(str(message), style="yellow")


def note(text: str, *, style: str = "dim") -> None:
    """A remark on stderr."""
    stderr.print(Text(text, style=style))


def emit(text: str) -> None:
    """A line of the result on stdout."""
    stdout.print(Text(text))


def print_json(value: Any) -> None:
    """The whole result on stdout as one JSON document."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


class _Rate(TextColumn):
    """Units per second of a bar."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        unit = task.fields.get("unit", "")
        return Text(f"{speed:.3g} {unit}/s" if speed else f"- {unit}/s")


class _Left(TextColumn):
    """Time left: what is known of it, else by the rate."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        known = task.fields.get("known_end")
        seconds = task.time_remaining if known is None else max(0.0, known - time.monotonic())
        return Text("-:--:--" if seconds is None else str(dt.timedelta(seconds=round(seconds))), style="cyan")


class _Lines:
    """A bar's stand-in where there is no terminal: a line now and then."""

    def __init__(self, title: str, total: int, unit: str) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.start = self.last = time.monotonic()
        note(f"{title}: {total} {unit}")

    def update(self, done: int, detail: str = "", outer: int = 0, left: float | None = None) -> None:  # noqa: ARG002
        """Say how far it is, if the last line was long ago or this is the end; the detail names the outer one."""
        now = time.monotonic()
        ended = done >= self.total and not left
        if done == 0 or (not ended and now - self.last < _SECONDS_BETWEEN_LINES):
            return
        self.last = now
        rate = done / max(now - self.start, 1e-9)
        left = (self.total - done) / rate if left is None else left
        eta = f", {now - self.start:.0f} s" if ended else f", {left:.0f} s left"
        note(f"{self.title}: {done}/{self.total} {self.unit}, {rate:.3g} {self.unit}/s{eta} {detail}".rstrip())


class _Bar:
    """A rich progress bar with a detail text, and one above it if it is part of something."""

    def __init__(self, progress: Progress, title: str, total: int, unit: str, outer: tuple[str, int] | None) -> None:
        self.progress, self.title = progress, title
        self.outer = None
        if outer is not None:
            self.outer = progress.add_task(outer[0], total=outer[1], unit=outer[0], detail="")
        self.task = progress.add_task(title, total=total, unit=unit, detail="")

    def update(self, done: int, detail: str = "", outer: int = 0, left: float | None = None) -> None:
        """Show how far it is, and the outer bar; and when all will be done, if that is known."""
        end = None if left is None else time.monotonic() + left
        self.progress.update(self.task, completed=done, detail=detail, known_end=end)
        if self.outer is not None:
            self.progress.update(self.outer, completed=outer, known_end=end)


@contextlib.contextmanager
def bar(title: str, total: int, unit: str, *, outer: tuple[str, int] | None = None) -> Iterator[_Bar | _Lines]:
    """Yield something with update(done, detail, outer, left): a bar with rate and time left, or lines in a log.

    Args:
        title: what is going on.
        total: units in all.
        unit: what is counted.
        outer: title and total of a second bar, above.
    """
    if not stderr.is_terminal:
        yield _Lines(title, total, unit)
        return
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        _Rate(),
        TextColumn("elapsed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        _Left(),
        TextColumn("[dim]{task.fields[detail]}"),
    )
    with Progress(*columns, console=stderr) as progress:
        yield _Bar(progress, title, total, unit, outer)


@contextlib.contextmanager
def phase(title: str) -> Iterator[None]:
    """Show that something without a measurable middle is going on, and how long it took."""
    start = time.monotonic()
    if stderr.is_terminal:
        with Progress(SpinnerColumn(), TextColumn(title), TimeElapsedColumn(), console=stderr, transient=True) as spin:
            spin.add_task(title, total=None)
            yield
    else:
        yield
    note(f"{title}: {time.monotonic() - start:.1f} s")
