"""The code search: back ends agree, exhaustive search is exact, error feedback and refinement match their algebra."""

import pytest
import torch
from torch import Tensor

from aqlm_tensor.quantizer import parallel, search
from aqlm_tensor.quantizer.hessian import descent_coupling, feedback_coupling, regularize
from aqlm_tensor.quantizer.layer import quantize_layer
from aqlm_tensor.quantizer.refine import refine_codebooks, row_errors
from aqlm_tensor.quantizer.search import Coupling, gather, sweep
from aqlm_tensor.scheme import AQLMScheme


def random_problem(count: int, size: int, height: int, group: int, groups: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Target [R, H, I], codebooks [K, S, H, G], metric [I, I]."""
    generator = torch.Generator().manual_seed(count * 1000 + size)
    target = torch.randn(70, height, groups * group, generator=generator)
    codebooks = torch.randn(count, size, height, group, generator=generator) / count**0.5
    inputs = torch.randn(200, groups * group, generator=generator)
    inputs[:, 1:] += 0.5 * inputs[:, :-1]
    metric = regularize(inputs.T @ inputs)
    assert metric is not None
    return target, codebooks, metric


def cost(target: Tensor, codebooks: Tensor, indices: Tensor, metric: Tensor) -> Tensor:
    return row_errors((target - gather(codebooks, indices)).double(), metric.double())


def independent(metric: Tensor, group: int) -> Coupling:
    """Each group on its own, the others ignored."""
    coupling = descent_coupling(metric, group)
    return Coupling(coupling.metric, torch.zeros_like(metric), causal=True)


SHAPES = [(1, 16, 1, 8), (2, 16, 1, 8), (2, 256, 1, 8), (3, 16, 2, 4), (5, 8, 1, 8), (8, 4, 3, 4), (2, 2, 1, 16)]


@pytest.mark.parametrize(("count", "size", "height", "group"), SHAPES)
def test_back_ends_agree(count: int, size: int, height: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    target, codebooks, metric = random_problem(count, size, height, group)
    found = {}
    for backend in ("numba", "torch"):
        if backend == "torch":
            monkeypatch.setattr(search, "compiled_search", lambda _device: None)
        first = sweep(target, None, codebooks, feedback_coupling(metric, group, 1.0), 4)
        second = sweep(target, first, codebooks, descent_coupling(metric, group), 4)
        found[backend] = (first, second)
    for one, two in zip(found["numba"], found["torch"], strict=True):
        same_rows = (one == two).flatten(1).all(1)
        assert same_rows.double().mean() > 0.95  # rounding may turn a near tie, and what follows it in that row
        torch.testing.assert_close(
            cost(target, codebooks, one, metric)[same_rows], cost(target, codebooks, two, metric)[same_rows]
        )


def test_without_a_compiler_the_search_says_once_that_it_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel.importlib.util, "find_spec", lambda _package: None)
    parallel._installed.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"pip install 'aqlm-tensor\[cpu\]'") as told:
            layers = [quantize_layer(torch.randn(8, 16), AQLMScheme.parse("2x2g8")) for _ in range(2)]
        assert len(told) == 1
    finally:
        parallel._installed.cache_clear()
    assert layers[0].error < 1


@pytest.mark.parametrize(("count", "size", "height", "group"), [(1, 32, 1, 8), (2, 16, 1, 8), (2, 13, 2, 4)])
def test_one_group_gets_the_best_of_all_combinations(count: int, size: int, height: int, group: int) -> None:
    target, codebooks, metric = random_problem(count, size, height, group, groups=1)
    found = sweep(target, None, codebooks, independent(metric, group), 4)
    grid = torch.cartesian_prod(*[torch.arange(size)] * count).view(-1, 1, count)
    sums = gather(codebooks, grid)
    errors = target[:, None].double() - sums[None].double()
    every = ((errors @ metric.double()) * errors).sum((2, 3))
    torch.testing.assert_close(cost(target, codebooks, found, metric), every.amin(1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("count", "size", "height", "group"), [*SHAPES, (2, 300, 1, 8), (3, 512, 1, 4)])
def test_coordinate_descent_never_makes_a_row_worse(count: int, size: int, height: int, group: int) -> None:
    target, codebooks, metric = random_problem(count, size, height, group)
    coupling = descent_coupling(metric, group)
    indices = torch.randint(size, (70, 5, count), generator=torch.Generator().manual_seed(0))
    before = cost(target, codebooks, indices, metric)
    for _ in range(3):
        untouched = indices.clone()
        new = sweep(target, indices, codebooks, coupling, 4)
        assert torch.equal(indices, untouched)
        after = cost(target, codebooks, new, metric)
        assert (after <= before * (1 + 1e-5) + 1e-6).all()
        indices, before = new, after


def test_error_feedback_accounts_for_the_whole_damped_cost() -> None:
    """With e~_j and D_j as documented, the sum of e~_j D_j e~_j^T is e (H + damping) e^T, whatever the error e."""
    _, _, metric = random_problem(1, 4, 1, 8)
    coupling = feedback_coupling(metric, 8, 0.5)
    error = torch.randn(3, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    total = torch.zeros(3, dtype=torch.float64)
    for j in range(5):
        block = slice(8 * j, 8 * j + 8)
        own, before = coupling.metric[j].double(), coupling.between(slice(0, 40), block)
        assert before is not None
        effective = error[:, block] + (error @ before.double()) @ torch.linalg.inv(own)
        total += ((effective @ own) * effective).sum(1)
    damped = metric.double() * 1.0
    damped.diagonal().mul_(1.25).add_(0.25)
    torch.testing.assert_close(total, ((error @ damped) * error).sum(1), rtol=1e-4, atol=1e-4)
    every = coupling.between(slice(0, 40), slice(0, 40))
    assert every is not None
    assert torch.equal(every, every.triu())


def test_error_feedback_beats_independent_choice() -> None:
    target, codebooks, metric = random_problem(2, 16, 1, 8, groups=12)
    fed = sweep(target, None, codebooks, feedback_coupling(metric, 8, 1.0), 4)
    alone = sweep(target, None, codebooks, independent(metric, 8), 4)
    assert cost(target, codebooks, fed, metric).sum() < cost(target, codebooks, alone, metric).sum()


def test_conjugate_gradients_reach_the_least_squares_solution() -> None:
    target, codebooks, metric = random_problem(2, 8, 2, 4)
    indices = sweep(target, None, codebooks, feedback_coupling(metric, 4, 1.0), 4)
    weights = torch.rand(70, generator=torch.Generator().manual_seed(2)) + 0.1
    refined = refine_codebooks(target, weights, indices, codebooks, metric, 60)

    def design(rows: Tensor) -> Tensor:  # [R, H, I] gradient of the decoded weight for each codebook element
        return torch.autograd.functional.jacobian(lambda c: gather(c, rows), codebooks).flatten(3)

    root = torch.linalg.cholesky(metric.double())
    matrix = (
        torch.einsum("rhin,ij->rhjn", design(indices).double(), root) * weights.double().sqrt()[:, None, None, None]
    )
    right = (target.double() @ root) * weights.double().sqrt()[:, None, None]
    best = torch.linalg.lstsq(matrix.reshape(-1, codebooks.numel()), right.reshape(-1, 1), driver="gelsd").solution
    optimum = (matrix.reshape(-1, codebooks.numel()) @ best - right.reshape(-1, 1)).square().sum()
    reached = (cost(target, refined, indices, metric) * weights).sum()
    start = (cost(target, codebooks, indices, metric) * weights).sum()
    assert reached - optimum <= 1e-4 * (start - optimum)
