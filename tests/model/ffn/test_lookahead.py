"""Guesses at a block's input, and the clock that decides whether they are made."""

from __future__ import annotations

import time

import numpy as np
import pytest

from flashrt.model.ffn.lookahead import KEPT, RATE, ROUND, TRIED, Lookahead


def some(seed: int, width: int = 37) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((1, width)).astype(np.float32)


def test_the_first_guess_is_the_input_without_attention() -> None:
    assert np.array_equal(Lookahead(37).guess(some(1)), some(1))


def test_what_attention_always_adds_is_learned() -> None:
    ahead, always = Lookahead(37), some(0)
    for seed in range(1, 60):
        ahead.guess(some(seed))
        ahead.learn(some(seed) + always + 0.01 * some(100 + seed))
    assert np.abs(ahead.guess(some(99)) - some(99) - always).max() < 0.02


def test_the_mean_is_a_running_one() -> None:
    ahead, expected = Lookahead(37), np.zeros((1, 37), np.float32)
    for seed in range(9):
        before, moved = some(seed), some(100 + seed)
        ahead.guess(before)
        ahead.learn(before + moved)
        expected += RATE * (moved - expected)
    assert np.allclose(ahead.guess(some(50)), some(50) + expected, atol=1e-5)


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def guessed(self, ahead: Lookahead, without: float, guessing: float) -> bool:
        """Run one token that takes so many seconds; whether it was guessed for."""
        chosen = ahead.begin()
        self.now += guessing if chosen else without
        ahead.end(some(0))
        return chosen


@pytest.mark.parametrize("pays", [True, False])
def test_the_faster_way_is_taken(pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, ahead = Clock(monkeypatch), Lookahead(37)
    times = (2.0, 1.9) if pays else (1.9, 2.0)
    chosen = [clock.guessed(ahead, *times) for _ in range(5 * ROUND)]
    for begin in range(0, len(chosen), ROUND):
        assert chosen[begin : begin + TRIED] == [False, True] * (TRIED // 2)
        assert set(chosen[begin + TRIED : begin + ROUND]) == {pays}


def test_it_follows_a_disk_that_becomes_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, ahead = Clock(monkeypatch), Lookahead(37)
    assert not [clock.guessed(ahead, 1.0, 1.2) for _ in range(4 * ROUND)][-1]
    assert [clock.guessed(ahead, 3.0, 2.0) for _ in range(KEPT * ROUND)][-1]


def test_one_slow_read_does_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, ahead = Clock(monkeypatch), Lookahead(37)
    for _ in range(4 * ROUND):
        clock.guessed(ahead, 2.0, 1.0)
    chosen = [clock.guessed(ahead, 2.0, 100.0 if n == 1 else 1.0) for n in range(2 * ROUND)]
    assert all(chosen[TRIED:ROUND])
