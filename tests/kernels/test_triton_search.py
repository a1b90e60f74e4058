"""The solver's Triton kernels against plain torch: on a GPU, or under Triton's interpreter (see conftest.py)."""

import importlib.util

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

from aqlm_tensor.kernels import triton_search
from aqlm_tensor.quantizer import nearest as nearest_module
from aqlm_tensor.quantizer import search
from aqlm_tensor.quantizer.hessian import descent_coupling, feedback_coupling, no_coupling, regularize
from aqlm_tensor.quantizer.refine import row_errors
from aqlm_tensor.quantizer.search import gather, sweep

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [  # rows, groups, K, S, H, G; the interpreter takes half a second a group
    (1, 2, 1, 2, 1, 8),
    (9, 3, 1, 16, 1, 4),
    (5, 2, 2, 256, 1, 8),
    (6, 3, 2, 8, 1, 8),
    (5, 2, 3, 16, 2, 4),
    (3, 2, 5, 4, 1, 12),
]
if DEVICE == "cuda":
    SHAPES += [(600, 70, 2, 256, 1, 8), (1100, 40, 3, 256, 1, 8), (70, 9, 8, 64, 2, 32), (33, 5, 2, 64, 1, 64)]


def problem(rows: int, groups: int, count: int, size: int, height: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Target [R, H, I], codebooks [K, S, H, G], metric [I, I]."""
    target = torch.randn(rows, height, groups * group)
    codebooks = torch.randn(count, size, height, group) / count**0.5
    inputs = torch.randn(2 * groups * group, groups * group)
    inputs[:, 1:] += 0.5 * inputs[:, :-1]
    metric = regularize(inputs.T @ inputs)
    assert metric is not None
    return target.to(DEVICE), codebooks.to(DEVICE), metric.to(DEVICE)


@pytest.mark.parametrize("shape", SHAPES)
def test_sweeps_agree_with_torch(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    target, codebooks, metric = problem(*shape)
    group = shape[-1]
    if DEVICE == "cpu":
        monkeypatch.setattr(search, "_BLOCK_COLUMNS", 2 * group)
    found: dict[str, list[Tensor]] = {}
    for backend in ("torch", "triton"):
        module = triton_search if backend == "triton" else None
        monkeypatch.setattr(search, "compiled_search", lambda _device, module=module: module)
        monkeypatch.setattr(nearest_module, "compiled_search", lambda _device: None)
        first = sweep(target, None, codebooks, feedback_coupling(metric, group, 1.0), 4)
        second = sweep(target, first, codebooks, descent_coupling(metric, group), 4)
        alone = sweep(target, None, codebooks, no_coupling(shape[1], group, target.device), 4)
        found[backend] = [first, second, alone]
    for one, two in zip(found["torch"], found["triton"], strict=True):
        assert two.min() >= 0
        assert two.max() < shape[3]
        same_rows = (one == two).flatten(1).all(1)
        assert same_rows.sum() >= 0.9 * len(same_rows) - 1  # rounding may turn a near tie, and what follows it
        errors = [row_errors((target - gather(codebooks, i)).double(), metric.double()) for i in (one, two)]
        torch.testing.assert_close(errors[0][same_rows], errors[1][same_rows])


def test_a_sweep_leaves_nothing_behind_its_rows() -> None:
    """Programs cover more rows than there are; what lies behind them stays as it was."""
    target, codebooks, metric = problem(5, 2, 2, 16, 1, 8)
    storage = torch.full((9, 2, 2), -7, device=DEVICE)
    indices, error = storage[:5], torch.zeros(9, 1, 16, device=DEVICE)
    coupling = descent_coupling(metric, 8)
    visit = search._CompiledBlocks(codebooks, coupling, triton_search, fresh=True)
    visit.prepare(slice(0, 16))
    visit(slice(0, 5), slice(0, 16), target, torch.zeros(5, 1, 16, device=DEVICE), error, storage)
    assert (indices >= 0).all()
    assert (storage[5:] == -7).all()
    assert (error[5:] == 0).all()
    torch.testing.assert_close(error[:5], target - gather(codebooks, indices))


@pytest.mark.parametrize(
    ("number", "size", "entry"), [(1, 1, 8), (70, 16, 8), (130, 100, 5), (65, 300, 32), (3, 20, 64)]
)
def test_nearest(number: int, size: int, entry: int) -> None:
    """Vectors of all sizes, each in one of three columns in no order."""
    linear, entries = torch.randn(number, entry, device=DEVICE), torch.randn(size, entry, device=DEVICE)
    linear *= torch.logspace(-3, 3, number, device=DEVICE)[:, None]
    squares = torch.rand(3, size, device=DEVICE)
    column = torch.randint(3, (number,), device=DEVICE)
    values, indices = triton_search.Nearest(entries)(linear, column, squares)
    every = squares[column].double() - 2 * linear.double() @ entries.double().T
    rounding = 2e-6 * (squares[column].double() + 2 * linear.abs().double() @ entries.abs().double().T).amax(1)
    assert ((values - every.amin(1)).abs() <= rounding).all()
    assert (every.gather(1, indices[:, None])[:, 0] - every.amin(1) <= rounding).all()


def test_nearest_takes_the_lowest_of_equals() -> None:
    entries = torch.ones(200, 8, device=DEVICE)
    column, squares = torch.zeros(3, dtype=torch.int64, device=DEVICE), torch.zeros(1, 200, device=DEVICE)
    _, indices = triton_search.Nearest(entries)(torch.ones(3, 8, device=DEVICE), column, squares)
    assert indices.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("rows", "columns", "count", "size", "width"),
    [(1, 1, 1, 4, 8), (100, 10, 2, 7, 8), (300, 30, 1, 3, 1), (40, 5, 3, 4, 100)],
)
def test_sums_by_code(rows: int, columns: int, count: int, size: int, width: int) -> None:
    codes = torch.randint(size, (rows, columns, count), device=DEVICE)
    values, weights = torch.randn(rows * columns, width, device=DEVICE), torch.rand(rows, device=DEVICE)
    blocks = torch.randn(columns, width, device=DEVICE)
    expected = torch.zeros(2, count, size, width, dtype=torch.float64, device=DEVICE)
    for k in range(count):
        expected[0, k].index_add_(0, codes[..., k].flatten(), values.double())
        expected[1, k].index_add_(0, codes[..., k].flatten(), (weights[:, None, None] * blocks).double().flatten(0, 1))
    sums = triton_search.CodeSums(codes, size)
    torch.testing.assert_close(sums(values).double(), expected[0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sums.weighted(weights, blocks).double(), expected[1], rtol=1e-5, atol=1e-4)
    assert torch.equal(sums(values), sums(values))
