"""Drafts from the text itself: what came after the last tokens when they came before.

Prompt lookup decoding (Saxena 2023) and its kin take one continuation; here several go into the tree, each with a
confidence learned from the text so far: how often a match of this length was right. Longer matches come first, of those
equally long the latest.

Earlier places are found through chains of those that end in the same tokens, latest first, as in DEFLATE (RFC 1951,
section 4): in the same two, so that long matches are found among many short ones, and in the same one. Work per token
is bounded, by TRIED places of each chain and LONGEST tokens.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from flashrt.speculate.drafter import Candidate

CHAINED = (2, 1)  # tokens in which the places of a chain agree
LONGEST = 16  # tokens of a match that are compared
TRIED = 16  # places of a chain that are looked at
WIDTH = 3  # continuations
DEPTH = 15  # tokens of each
DECAY = 0.99  # of how matches fared, per match of the same rank and length
PRIOR_WEIGHT = 2.0  # matches
PRIOR_RIGHT = (0.5, 0.1, 0.1)  # share of matches that are right, by rank, before any was seen


class Match(NamedTuple):
    """An earlier place where the last `length` tokens stood; `next` is the position after it."""

    length: int
    next: int


class _Chains:
    """For each place of a text of up to `context` tokens, the last one before it where the same `order` tokens end.

    Chains are kept by hash, so that other places may be among them.
    """

    def __init__(self, tokens: array[int], order: int) -> None:
        self._tokens, self._order = tokens, order
        self._earlier = array("i", bytes(4 * len(tokens)))  # -1: none
        # The power of two gives each token but the last two slots at most.
        self._latest = array("i", [-1]) * (1 << max(len(tokens) - 2, 0).bit_length())  # by hash
        self.nbytes = 4 * (len(self._earlier) + len(self._latest))

    def append(self, place: int) -> None:
        """The text goes on at `place`."""
        slot = self._slot(place)
        self._earlier[place] = self._latest[slot]
        self._latest[slot] = place

    def before(self, place: int) -> Iterator[int]:
        """Earlier places, latest first, TRIED at most."""
        for _ in range(TRIED):
            place = self._earlier[place]
            if place < 0:
                break
            yield place

    def _slot(self, place: int) -> int:
        mixed = 0
        for token in self._tokens[max(place + 1 - self._order, 0) : place + 1]:
            mixed = (mixed + token + 1) * 0x9E3779B1 & 0xFFFFFFFF
        return (mixed >> 7) % len(self._latest)


class Lookup:
    """A `Drafter` for one sequence of up to `context` tokens, in `nbytes` bytes: at most 28 for each but the last."""

    name = "lookup"

    def __init__(self, context: int) -> None:
        self._tokens = array("i", bytes(4 * context))
        self._chains = [_Chains(self._tokens, order) for order in CHAINED]
        self.nbytes = 4 * context + sum(chains.nbytes for chains in self._chains)
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
            right[match.length] = DECAY * right[match.length] + (self._tokens[match.next] == token)
            tried[match.length] = DECAY * tried[match.length] + 1

    def _append(self, token: int) -> None:
        self._tokens[self._count] = token
        for chains in self._chains:
            chains.append(self._count)
        self._count += 1

    def _find(self) -> list[Match]:
        """The best matches, each with another next token."""
        matches = sorted(self._candidates(), key=lambda match: (-match.length, -match.next))
        by_next: dict[int, Match] = {}
        for match in matches:
            by_next.setdefault(self._tokens[match.next], match)
        return list(by_next.values())[:WIDTH]

    def _candidates(self) -> Iterator[Match]:
        last = self._count - 1
        for chains in self._chains:
            for place in chains.before(last):
                length = self._common(place, last)
                if length > 0:  # not so where hashes collide
                    yield Match(length, place + 1)

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
