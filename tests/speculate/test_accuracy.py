"""Estimates from counts: they go where the truth is, and back where nothing was heard for long."""

from __future__ import annotations

import numpy as np
import pytest

from flashrt.speculate.accuracy import CERTAIN, Accuracy, Promise


def told(accuracy: Accuracy, promise: Promise, share: float, passes: int, seed: int = 0) -> None:
    random = np.random.default_rng(seed)
    for _ in range(passes):
        accuracy.record(promise, bool(random.random() < share))
        accuracy.end_pass()


def test_confidence_is_believed_at_first() -> None:
    assert Accuracy().estimate(Promise("a", 0, 1, 0.7)) == pytest.approx(0.7)


@pytest.mark.parametrize(("confidence", "share"), [(0.9, 0.5), (0.3, 0.8), (0.5, 0.5), (0.05, 0.02), (0.9, 1.0)])
def test_estimates_go_to_the_truth(confidence: float, share: float) -> None:
    accuracy, promise = Accuracy(), Promise("a", 0, 1, confidence)
    told(accuracy, promise, share, 400)
    assert accuracy.estimate(promise) == pytest.approx(min(share, CERTAIN), abs=0.11)


def test_promises_of_other_kinds_are_left_alone() -> None:
    accuracy = Accuracy()
    told(accuracy, Promise("a", 0, 2, 0.5), 0.0, 50)
    assert accuracy.estimate(Promise("a", 0, 3, 0.55)) < 0.1, "depths 2 and 3 are one kind"
    for other in (Promise("b", 0, 2, 0.5), Promise("a", 1, 2, 0.5), Promise("a", 0, 1, 0.5), Promise("a", 0, 2, 0.9)):
        assert accuracy.estimate(other) == pytest.approx(other.confidence)


def test_within_a_kind_confidence_still_counts() -> None:
    accuracy = Accuracy()
    told(accuracy, Promise("a", 0, 1, 0.7), 0.3, 100)
    low, high = accuracy.estimate(Promise("a", 0, 1, 0.62)), accuracy.estimate(Promise("a", 0, 1, 0.78))
    assert high / low == pytest.approx(0.78 / 0.62)


def test_what_was_not_heard_of_for_long_is_believed_again() -> None:
    accuracy, promise = Accuracy(), Promise("a", 0, 1, 0.8)
    told(accuracy, promise, 0.0, 60)
    assert accuracy.estimate(promise) < 0.1
    for _ in range(300):
        accuracy.end_pass()
    assert accuracy.estimate(promise) > 0.7
