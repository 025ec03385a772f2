"""Lookup against a search through the whole text, and its confidence against how it fared."""

from __future__ import annotations

import numpy as np
import pytest

from flashrt.budget.planner import LOOKUP_BYTES
from flashrt.speculate import lookup
from flashrt.speculate.drafter import Candidate
from flashrt.speculate.lookup import DEPTH, LONGEST, WIDTH, Lookup


def candidates(drafter: Lookup) -> list[Candidate]:
    (step,) = drafter.propose()
    return step


def firsts(drafter: Lookup) -> list[int]:
    return [candidate.path[0] for candidate in candidates(drafter) if len(candidate.path) == 1]


def searched(tokens: list[int]) -> list[int]:
    """First tokens of the continuations, by looking at every earlier place."""
    last, found = len(tokens) - 1, []
    for place in range(last - 1, -1, -1):
        length = 0
        while length < min(LONGEST, place + 1) and tokens[place - length] == tokens[last - length]:
            length += 1
        if length > 0:
            found.append((length, tokens[place + 1]))
    found.sort(key=lambda pair: -pair[0])
    return list(dict.fromkeys(token for _, token in found))[:WIDTH]


def repetitive(seed: int, count: int, vocab: int) -> list[int]:
    """Text of which parts come again."""
    random = np.random.default_rng(seed)
    tokens = random.integers(vocab, size=20).tolist()
    while len(tokens) < count:
        begin, length = random.integers(len(tokens)), random.integers(1, 30)
        tokens += tokens[begin : begin + length] if random.random() < 0.7 else [int(random.integers(vocab))]
    return tokens[:count]


@pytest.mark.parametrize(("seed", "vocab"), [(0, 5), (1, 40), (2, 150_000), (3, 2)])
def test_against_a_search(seed: int, vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "TRIED", 10_000)
    tokens = repetitive(seed, 300, vocab)
    drafter = Lookup(300)
    for end, token in enumerate(tokens, 1):
        drafter.accept([token])
        assert firsts(drafter) == searched(tokens[:end])


def test_at_once_is_as_one_by_one() -> None:
    tokens = repetitive(4, 200, 9)
    whole, single = Lookup(200), Lookup(200)
    whole.accept(tokens)
    for token in tokens:
        single.accept([token])
    assert candidates(whole) == candidates(single) != []


def test_continuations_are_what_came_then() -> None:
    drafter = Lookup(100)
    drafter.accept([1, 2, 3, 4, 5, 6, 9, 2, 3, 7, 8, 1, 2, 3])
    paths = {len(c.path): c.path for c in candidates(drafter) if c.path[0] == 4}
    assert paths[DEPTH] == (4, 5, 6, 9, 2, 3, 7, 8, 1, 2, 3, 4, 5, 6, 9)
    assert firsts(drafter) == [4, 7], "the longer match comes first, then the later one"
    for candidate in candidates(drafter):
        assert candidate.path[:-1] in [(), *(c.path for c in candidates(drafter))]


def test_what_repeats_itself_goes_on() -> None:
    drafter = Lookup(100)
    drafter.accept([7, 5, 1, 2, 3, 1, 2, 3, 1, 2])
    assert candidates(drafter)[-1].path == (3, 1, 2) * 5


def test_confidence_is_how_often_such_matches_were_right() -> None:
    """What follows the same two tokens is one token for 80% of them, another for the rest."""
    random = np.random.default_rng(6)
    tokens = [token for i in range(2000) for token in (0, 1, 2 if random.random() < 0.8 else 3, 4 + i)]
    drafter = Lookup(len(tokens) + 2)
    drafter.accept([*tokens, 0, 1])
    assert firsts(drafter)[:2] in ([2, 3], [3, 2])
    seen = [drafter.confidence(rank, 2) for rank in range(WIDTH)]
    assert seen[0] == pytest.approx(0.8**2 + 0.2**2, abs=0.15)  # that the latest place says the same as the next
    assert seen[1] == pytest.approx(2 * 0.8 * 0.2, abs=0.15)
    assert seen[2] < 0.15


def test_memory_is_bounded() -> None:
    drafter = Lookup(1000)
    assert drafter.nbytes <= 28 * 1000
    drafter.accept(list(range(1000)))
    with pytest.raises(ValueError, match="room for 1000 tokens, and 1001"):
        drafter.accept([1])


@pytest.mark.parametrize("context", [2, 3, 4, 5, 7, 8, 9, 1023, 1024, 1025, 32768, 40000])
def test_what_the_plan_keeps_for_a_context_holds_it_and_the_token_after(context: int) -> None:
    assert Lookup(context + 1).nbytes <= LOOKUP_BYTES * context


@pytest.mark.parametrize("tokens", [[], [3], [3, 4]])
def test_short_texts_say_nothing(tokens: list[int]) -> None:
    drafter = Lookup(8)
    drafter.accept(tokens)
    assert candidates(drafter) == []
