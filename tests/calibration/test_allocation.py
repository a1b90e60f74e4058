"""The knapsack against trying everything, budgets that cannot be met, and what an allocation says."""

import itertools
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aqlm_tensor import AQLMWeightConfig
from aqlm_tensor.calibration.allocation import Allocation, Choice, LayerGroup, choose_schemes

SCHEMES = ("1x8g8", "2x8g8", "3x8g8")


def group(index: int, weights: int, sizes: list[int], losses: list[float]) -> LayerGroup:
    choices = tuple(
        Choice(scheme, bits, loss / 10, loss) for scheme, bits, loss in zip(SCHEMES, sizes, losses, strict=False)
    )
    return LayerGroup((f"blocks.{index}.up", f"blocks.{index}.gate"), weights, choices)


def brute_force(groups: list[LayerGroup], bits: float) -> float:
    budget = bits * sum(one.weights for one in groups)
    fitting = (
        sum(choice.loss for choice in chosen)
        for chosen in itertools.product(*(one.choices for one in groups))
        if sum(choice.bits for choice in chosen) <= budget
    )
    return min(fitting)


@given(
    st.lists(
        st.tuples(
            st.integers(1, 50),
            st.lists(st.integers(1, 60), min_size=3, max_size=3),
            st.lists(st.floats(0, 10), min_size=3, max_size=3),
        ),
        min_size=1,
        max_size=5,
    ),
    st.floats(0, 1),
)
def test_the_choice_is_the_best_of_all(parts: list[tuple[int, list[int], list[float]]], where: float) -> None:
    groups = [group(index, *part) for index, part in enumerate(parts)]
    weights = sum(one.weights for one in groups)
    least, most = (sum(f(choice.bits for choice in one.choices) for one in groups) for f in (min, max))
    bits = (least + where * (most - least)) / weights * (1 + 1e-12)
    found = choose_schemes(groups, bits)
    assert found.bits_per_weight <= bits
    assert found.loss == pytest.approx(brute_force(groups, bits), abs=1e-9)


def large(count: int) -> list[LayerGroup]:
    """Groups like those of a model: losses fall by a factor with each codebook, and differ by orders of magnitude."""
    choose = random.Random(0)
    groups = []
    for index in range(count):
        weights = choose.choice([552_960, 331_776, 1_769_472, 884_736])
        sensitivity = 10 ** choose.uniform(-5, -2)
        sizes = [weights * codebooks + 32_768 * codebooks for codebooks in (1, 2, 3)]
        groups.append(group(index, weights, sizes, [sensitivity * factor for factor in (0.3, 0.09, 0.03)]))
    return groups


def test_large_budgets_are_used_up_and_more_bits_never_cost_more() -> None:
    groups = large(120)
    found = [choose_schemes(groups, bits) for bits in (1.5, 2.0, 2.25, 2.5, 3.0)]
    for allocation in found:
        assert 0 <= allocation.budget - allocation.bits_per_weight < 0.01
    losses = [allocation.loss for allocation in found]
    assert losses == sorted(losses, reverse=True)
    uniform = sum(one.choices[1].loss for one in groups)
    bits = sum(one.choices[1].bits for one in groups) / sum(one.weights for one in groups)
    assert choose_schemes(groups, bits).loss < 0.7 * uniform


def test_more_than_enough_gives_everyone_the_least_loss() -> None:
    groups = large(3)
    assert {choice.scheme for choice in choose_schemes(groups, 99).chosen} == {"3x8g8"}


def test_budgets_that_cannot_be_met_are_refused() -> None:
    with pytest.raises(ValueError, match=r"1 bits a weight cannot be reached: the smallest of the schemes take 1\.0"):
        choose_schemes(large(4), 1.0)
    with pytest.raises(ValueError, match="cannot be reached"):
        choose_schemes(large(4), float("nan"))
    with pytest.raises(ValueError, match="no layers"):
        choose_schemes([], 2.0)


def test_what_an_allocation_says() -> None:
    groups = [group(0, 10, [10, 20, 30], [3.0, 2.0, 1.0]), group(1, 10, [10, 20, 30], [0.3, 0.2, 0.1])]
    found = choose_schemes(groups, 2.0)
    assert found == Allocation(tuple(groups), (groups[0].choices[2], groups[1].choices[0]), 2.0)
    assert found.schemes == {
        "blocks.0.up": "3x8g8",
        "blocks.0.gate": "3x8g8",
        "blocks.1.up": "1x8g8",
        "blocks.1.gate": "1x8g8",
    }
    config = found.config(AQLMWeightConfig("2x8g8", seed=5))
    assert {key: one.scheme for key, one in config.fqn_to_config.items()} == found.schemes  # pyright: ignore
    assert {one.seed for one in config.fqn_to_config.values()} == {5}  # pyright: ignore
    assert str(found).splitlines()[-1] == "2.000 bits a weight (at most 2), expected to add 1.3 nats a token"
    assert "up/gate" in str(found)
    assert json.loads(json.dumps(found.as_dict()))["groups"][1]["chosen"] == "1x8g8"
