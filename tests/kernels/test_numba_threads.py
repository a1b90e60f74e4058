"""The Numba kernels give the same bits whoever calls them, on however many threads, in whichever process."""

import hashlib
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from aqlm_tensor.kernels import numba_linear, numba_parallel
from tests.conformance import assert_same_bits, threads
from tests.strategies import random_parts

SCHEMES = ("2x8g8", "1x4g8", "4x8g8", "8x8g32", "1x12g8")
ROWS = (1, 3, 16, 40)


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def outputs(scheme: str, rows: int) -> list[torch.Tensor]:
    """Linear, its gradient and the weight for a shape large enough that several threads are used."""
    parts = random_parts(scheme, 2056, 1024, seed=3)
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 1024, generator=generator)
    grad = torch.randn(rows, 2056, generator=generator)
    return [
        numba_linear.linear(x, *parts, None),
        numba_linear.linear_input_grad(grad, *parts),
        numba_linear.dequantize(*parts),
    ]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_number_of_threads_does_not_matter(scheme: str, rows: int) -> None:
    with threads(1):
        expected = outputs(scheme, rows)
    for count in (2, 3, 7):
        with threads(count):
            for actual, wanted in zip(outputs(scheme, rows), expected, strict=True):
                assert_same_bits(actual, wanted)


def test_repeats() -> None:
    parts = random_parts("2x8g8", 1024, 1024)
    x = torch.randn(2, 1024)
    expected = numba_linear.linear(x, *parts, None)
    for repeat in range(100):
        with threads(1 + repeat % 3):
            assert_same_bits(numba_linear.linear(x, *parts, None), expected)


def test_many_callers() -> None:
    """Several Python threads call at once, each with its own number of rows, while others keep torch busy."""
    parts = random_parts("2x8g8", 1536, 1024)
    inputs = [torch.randn(rows, 1024) for rows in (1, 1, 5, 20)]
    expected = [numba_linear.linear(x, *parts, None) for x in inputs]
    failures: list[str] = []
    stop = threading.Event()

    def call(index: int) -> None:
        ours = [numba_linear.linear(inputs[index], *parts, None) for _ in range(25)]
        failures.extend(f"input {index}" for y in ours if not torch.equal(y, expected[index]))

    def disturb() -> None:
        noise = torch.randn(256, 256)
        while not stop.is_set():
            noise.mm(noise)

    with threads(2):
        others = [threading.Thread(target=disturb) for _ in range(2)]
        callers = [threading.Thread(target=call, args=(i,)) for i in range(len(inputs))]
        for thread in others + callers:
            thread.start()
        for thread in callers:
            thread.join()
        stop.set()
        for thread in others:
            thread.join()
    assert not failures


def test_python_threads_instead_of_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    with threads(2):
        expected = outputs("2x8g8", 2)
        monkeypatch.setattr(numba_parallel, "_openmp_parallel", lambda: None)
        for actual, wanted in zip(outputs("2x8g8", 2), expected, strict=True):
            assert_same_bits(actual, wanted)


def test_number_of_threads_is_left_alone() -> None:
    for count in (1, 3):
        with threads(count):
            outputs("2x8g8", 1)
            assert torch.get_num_threads() == count


_PARTS = random_parts("2x8g8", 2048, 1024)


def _send(connection, x) -> None:
    connection.send(digest(numba_linear.linear(x, *_PARTS, None)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_forked_child() -> None:
    """A child may use several threads although its parent did before it, which libgomp alone could not."""
    x = torch.randn(1, 1024)
    with threads(2):
        expected = digest(numba_linear.linear(x, *_PARTS, None))
        context = multiprocessing.get_context("fork")
        for _ in range(3):
            receiver, sender = context.Pipe(duplex=False)
            child = context.Process(target=_send, args=(sender, x))
            child.start()
            assert receiver.poll(60), "the child hangs"
            assert receiver.recv() == expected
            child.join()
        assert digest(numba_linear.linear(x, *_PARTS, None)) == expected


_SCRIPT = """
import torch
from tests.kernels.test_numba_threads import digest, outputs
torch.set_num_threads({count})
print(*(digest(output) for rows in (1, 16) for output in outputs("2x8g8", rows)))
"""


def test_other_processes() -> None:
    expected = " ".join(digest(output) for rows in (1, 16) for output in outputs("2x8g8", rows))
    for count in (1, 2):
        command = [sys.executable, "-P", "-c", _SCRIPT.format(count=count)]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        ran = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd="/")
        assert ran.stdout.strip() == expected
