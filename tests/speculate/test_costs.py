"""The line through measured times: near the numbers in use, and never stuck."""

from __future__ import annotations

import numpy as np
import pytest

from flashrt.speculate.costs import MEMORY, PassCost, StepCosts


def measured(*pairs: tuple[int, float]) -> PassCost:
    cost = PassCost()
    for positions, seconds in pairs:
        cost.record(positions, seconds)
    return cost


def test_more_positions_cost_nothing_until_that_was_seen() -> None:
    assert not PassCost().measured
    assert measured((1, 0.5)).seconds(2) == pytest.approx([0.5] * 2)
    assert measured((1, 0.5), (1, 0.7)).seconds(2) == pytest.approx([0.6] * 2, rel=0.02)


def test_a_line_is_found() -> None:
    random = np.random.default_rng(0)
    sizes = random.integers(1, 17, 60).tolist()
    cost = measured(*((n, 0.4 + 0.05 * n + 0.01 * random.standard_normal()) for n in sizes))
    assert cost.seconds(16) == pytest.approx([0.4 + 0.05 * n for n in range(1, 17)], abs=0.02)


def test_more_positions_are_never_thought_cheaper() -> None:
    assert measured((1, 1.0), (8, 0.5)).seconds(8) == pytest.approx([0.74] * 8, abs=0.02)


def test_the_line_is_that_of_the_numbers_in_use() -> None:
    """Flat up to eight positions, steep beyond: among 6 to 8, the rise at 16 is forgotten."""
    cost = measured((16, 9.0), *((6 + n % 3, 1.0) for n in range(200)))
    assert cost.seconds(8)[-1] == pytest.approx(1.0, abs=0.01)


def test_a_hiccup_is_forgotten() -> None:
    cost = measured((1, 1.0), (2, 30.0))
    assert cost.seconds(2)[1] > 10
    for _ in range(200):
        cost.record(1, 1.0)
    assert cost.seconds(2) == pytest.approx([1.0, 1.0], abs=0.05)


def test_one_hiccup_among_others_changes_nothing() -> None:
    calm = [(n, 1 + 0.05 * (n - 1)) for n in (1, 2, 4, 8, 12, 12, 12, 11, 12, 1)]
    for at in range(2, len(calm)):
        disturbed = [(n, 10 * s if i == at else s) for i, (n, s) in enumerate(calm)]
        assert measured(*disturbed).seconds(12) == pytest.approx([1 + 0.05 * x for x in range(12)], rel=0.1)


def test_a_slow_machine_is_slow_for_every_number_of_positions() -> None:
    cost = measured(*((n, 1 + 0.05 * (n - 1)) for n in (1, 2, 4, 8, 12, 12, 12)))
    for _ in range(3):
        cost.record(12, 3 * 1.55)
    assert cost.seconds(12)[0] > 2


def test_no_more_than_twice_as_many_positions_are_tried_as_ever_were() -> None:
    assert len(measured((1, 1.0)).seconds(12)) == 2
    assert len(measured((1, 1.0), (2, 1.0), (4, 1.0)).seconds(12)) == 8
    assert len(measured((1, 1.0), (8, 1.0)).seconds(12)) == 12


def test_steps_by_drafter() -> None:
    costs = StepCosts()
    assert costs.seconds("a") == 0
    for seconds in [4.0] + [1.0] * 200:
        costs.record("a", seconds)
    costs.record("b", 7.0)
    assert costs.seconds("a") == pytest.approx(1, abs=0.01)
    assert costs.seconds("b") == 7


@pytest.mark.parametrize("steps", [(9.0, 1.0), (1.0, 9.0)])
def test_the_least_of_two_steps_counts(steps: tuple[float, float]) -> None:
    costs = StepCosts()
    for seconds in steps:
        costs.record("a", seconds)
    assert costs.seconds("a") == 1
    costs.record("a", 9.0)
    assert costs.seconds("a") == 9, "the median of three"


def test_what_a_drafter_took_is_forgotten_when_it_is_not_asked() -> None:
    costs = StepCosts()
    for drafter in ("a", "b"):
        costs.record(drafter, 7.0)
    for i in range(MEMORY):
        assert costs.seconds("a") == 7
        costs.pass_by("a")
        costs.pass_by("b")
        if i == 3:
            costs.record("b", 7.0)
    assert costs.seconds("a") == 0
    assert costs.seconds("b") == 7, "it was asked in between"
