"""Guesses one layer ahead, made where they pay."""

from __future__ import annotations

import pytest

from flashrt.kv.guesses import PROBE, Guesses

LAYERS = 7


def run(guesses: Guesses, tokens: int, wait_per_cell: float, cost: float) -> list[int]:
    """Layers guessed for in each token; of 100 cells that are missing, a guess brings 70, whose wait it saves."""
    made = []
    for _ in range(tokens):
        made.append(0)
        for _ in range(LAYERS):
            if guesses.wanted():
                guesses.made(cost)
                made[-1] += 1
                guesses.fetched(30, 70, 30 * wait_per_cell)
            else:
                guesses.fetched(100, 0, 100 * wait_per_cell)
    return made


@pytest.mark.parametrize(("cost", "pays"), [(0.5, True), (0.9, False)])
def test_guesses_are_made_where_they_save_more_than_they_cost(cost, pays):
    guesses = Guesses(LAYERS)
    run(guesses, 4 * PROBE, 0.01, cost)
    made = run(guesses, 10 * PROBE, 0.01, cost)
    assert guesses.pay == pays
    usual = sum(count == (LAYERS if pays else 0) for count in made)
    assert len(made) - 22 <= usual < len(made)  # the other way is tried now and then


def test_what_changes_is_learned():
    guesses = Guesses(LAYERS)
    for cost, pays in ((0.9, False), (0.2, True), (2.0, False)):
        run(guesses, 60 * PROBE, 0.01, cost)
        assert guesses.pay == pays


def test_nothing_is_concluded_from_layers_that_miss_nothing():
    guesses = Guesses(LAYERS)
    for _ in range(100):
        guesses.fetched(0, 0, 0.0)
    assert guesses.pay
