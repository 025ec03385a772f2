"""Drafts from the text itself: what came after the last tokens when they came before.

Prompt lookup decoding (Saxena 2023) and its kin take one continuation; here several go into the tree, each with a
confidence learned from the text so far: how often a match of this length was right. Longer matches come first, of those
equally long the latest.

Earlier places are found through chains of those that end in the same two tokens, latest first, as in DEFLATE (RFC
1951, section 4). Work per token is bounded, by TRIED places of LONGEST tokens.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from flashrt.speculate.drafter import Candidate

SHORTEST, LONGEST = 2, 16  # tokens of a match; of longer ones only as many are compared
TRIED = 16  # places that are looked at
WIDTH = 3  # continuations
DEPTH = 15  # tokens of each
MEMORY = 0.99  # of how matches fared, per match of the same rank and length
PRIOR_WEIGHT = 2.0  # matches
PRIOR_RIGHT = (0.5, 0.1, 0.1)  # share of matches that are right, by rank, before any was seen


class Match(NamedTuple):
    """An earlier place where the last `length` tokens stood; `next` is the position after it."""

    length: int
    next: int


class Lookup:
    """A `Drafter` for one sequence of up to `context` tokens, in `nbytes` bytes: at most 16 for each of them."""

    name = "lookup"

    def __init__(self, context: int) -> None:
        self._tokens = array("i", bytes(4 * context))
        self._earlier = array("i", bytes(4 * context))  # the last place before this one that ends alike; -1: none
        self._latest = array("i", [-1]) * (1 << max(context - 1, 1).bit_length())  # by hash
        self.nbytes = 4 * (2 * context + len(self._latest))
        self._count = 0
        self._matches: list[Match] = []
        self._right = [[PRIOR_WEIGHT * share] * (LONGEST + 1) for share in PRIOR_RIGHT]
        self._tried = [[PRIOR_WEIGHT] * (LONGEST + 1) for _ in PRIOR_RIGHT]

    def accept(self, tokens: Sequence[int]) -> None:
        """See `Drafter.accept`. Raises ValueError when there is no room: no token is ever dropped."""
        if self._count + len(tokens) > len(self._tokens):
            raise ValueError(f"there is room for {len(self._tokens)} tokens, and {self._count + len(tokens)} have come")
        for token in tokens:
            self._judge(token)
            self._append(token)
            self._matches = self._find()

    def propose(self) -> Iterator[list[Candidate]]:
        """See `Drafter.propose`: one step."""
        yield [candidate for rank, match in enumerate(self._matches) for candidate in self._continue(rank, match)]

    def confidence(self, rank: int, length: int) -> float:
        """The share of matches right so far, recent ones weighing more, among those of this rank and length."""
        length = min(length, LONGEST)
        return self._right[rank][length] / self._tried[rank][length]

    def _judge(self, token: int) -> None:
        for rank, match in enumerate(self._matches):
            right, tried = self._right[rank], self._tried[rank]
            right[match.length] = MEMORY * right[match.length] + (self._tokens[match.next] == token)
            tried[match.length] = MEMORY * tried[match.length] + 1

    def _append(self, token: int) -> None:
        place = self._count
        self._tokens[place] = token
        self._count += 1
        if place > 0:
            slot = self._slot(place)
            self._earlier[place] = self._latest[slot]
            self._latest[slot] = place

    def _slot(self, place: int) -> int:
        pair = self._tokens[place - 1] * 0x9E3779B1 + self._tokens[place]
        return (pair * 0x85EBCA6B >> 15) % len(self._latest)

    def _find(self) -> list[Match]:
        """The best matches, each with another next token."""
        matches = sorted(self._candidates(), key=lambda match: -match.length)
        by_next: dict[int, Match] = {}
        for match in matches:
            by_next.setdefault(self._tokens[match.next], match)
        return list(by_next.values())[:WIDTH]

    def _candidates(self) -> Iterator[Match]:
        last = self._count - 1
        place = self._earlier[last] if last > 0 else -1
        for _ in range(TRIED):
            if place < 0:
                break
            length = self._common(place, last)
            if length >= SHORTEST:  # not so where hashes collide
                yield Match(length, place + 1)
            place = self._earlier[place]

    def _common(self, place: int, last: int) -> int:
        """How many tokens up to both places are the same."""
        tokens, most = self._tokens, min(LONGEST, place + 1)
        length = 0
        while length < most and tokens[place - length] == tokens[last - length]:
            length += 1
        return length

    def _continue(self, rank: int, match: Match) -> Iterator[Candidate]:
        """The tokens after the match. Where they end they begin again: text that repeats itself goes on so."""
        period = self._count - match.next
        path: tuple[int, ...] = ()
        for ahead in range(DEPTH):
            path = (*path, self._tokens[match.next + ahead % period])
            yield Candidate(path, self.confidence(rank if ahead == 0 else 0, match.length + ahead))
