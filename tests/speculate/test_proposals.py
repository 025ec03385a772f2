"""Candidates of several drafters in one tree, judged together."""

from __future__ import annotations

import pytest

from flashrt.speculate.accuracy import Accuracy, Promise
from flashrt.speculate.drafter import Candidate
from flashrt.speculate.proposals import STEP, STEP_CONFIDENCE, Proposals


class Told(Accuracy):
    """Remembers what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[Promise, bool]] = []

    def record(self, promise: Promise, right: bool) -> None:
        self.told.append((promise, right))
        super().record(promise, right)


def test_drafters_share_nodes() -> None:
    proposals = Proposals(9, Accuracy())
    assert proposals.add("a", [Candidate((1,), 0.5), Candidate((1, 2), 0.6), Candidate((3,), 0.2)]) == [1]
    assert proposals.add("b", [Candidate((1,), 0.8), Candidate((1, 4), 0.1)]) == [1]
    assert proposals.tree.tokens == [9, 1, 2, 3, 4]
    assert proposals.chances() == pytest.approx([1, 0.8, 0.8 * 0.6, 0.2, 0.8 * 0.1])


@pytest.mark.parametrize("confidences", [(0.8, 0.3), (0.3, 0.8), (0.8, 0.8)])
def test_the_surest_decides_whoever_comes_first(confidences: tuple[float, float]) -> None:
    proposals = Proposals(9, Accuracy())
    for drafter, confidence in zip("ab", confidences, strict=True):
        proposals.add(drafter, [Candidate((1,), confidence)])
    assert proposals.chances() == pytest.approx([1, 0.8])


def test_a_path_from_nowhere_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a proposes \(1, 2\)"):
        Proposals(9, Accuracy()).add("a", [Candidate((1, 2), 0.5)])


def test_everything_that_was_reached_is_judged() -> None:
    accuracy = Told()
    proposals = Proposals(9, accuracy)
    proposals.add("a", [Candidate((1,), 0.5), Candidate((3,), 0.3), Candidate((3, 5), 0.6), Candidate((1, 2), 0.9)])
    proposals.add("b", [Candidate((4,), 0.1)])
    proposals.learn([3, 6, 7])
    assert accuracy.told == [
        (Promise("a", 0, 1, 0.5), False),
        (Promise("a", 1, 1, 0.3), True),
        (Promise("b", 0, 1, 0.1), False),
        (Promise("a", STEP, 1, STEP_CONFIDENCE), True),
        (Promise("b", STEP, 1, STEP_CONFIDENCE), False),
        (Promise("a", 0, 2, 0.6), False),
        (Promise("a", STEP, 2, STEP_CONFIDENCE), False),
    ]


def test_outlook_is_what_steps_have_brought() -> None:
    accuracy = Accuracy()
    for _ in range(200):
        proposals = Proposals(9, accuracy)
        proposals.add("a", [Candidate((1,), 0.5), Candidate((2,), 0.5)])
        proposals.learn([2])
    proposals = Proposals(9, accuracy)
    assert proposals.outlook("a", [0], 3) == pytest.approx([0.98, 0.98 * 0.8, 0.98 * 0.8**2], abs=0.02)
    frontier = proposals.add("a", [Candidate((1,), 0.5), Candidate((2,), 0.25)])
    reached = proposals.chances()[1]  # the first choice is what the next step goes on from
    assert proposals.outlook("a", frontier, 3) == pytest.approx([reached * 0.8, reached * 0.8**2], abs=0.02)
    assert proposals.outlook("a", frontier, 1) == []
