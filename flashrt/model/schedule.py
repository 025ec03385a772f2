"""What passes take from the ring, in the order in which they compute, read ahead across layers and passes."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from flashrt.cache.streamer import Submit
from flashrt.cache.weights import Weights
from flashrt.model.ffn.choose import Ffns
from flashrt.storage.layout import Block


@dataclass(frozen=True, slots=True)
class PassKind:
    """A pass over the weights: with the head or without, of many tokens (`wide`) or few."""

    head: bool
    wide: bool


class _Stretch(NamedTuple):
    """Neighbours in the order of a pass whose blocks are read in the same way."""

    expect: Sequence[Callable[[bool], Iterable[Block]]]
    submit: Submit | None

    def blocks(self, wide: bool) -> Iterator[Block]:
        return itertools.chain.from_iterable(expect(wide) for expect in self.expect)


class Schedule:
    """Has the ring of `weights` bring what passes take."""

    def __init__(self, weights: Weights, ffns: Ffns) -> None:
        self._weights, self._ffns = weights, ffns
        steps: list[tuple[Callable[[bool], Iterable[Block]], Submit | None]] = []
        for i, block in enumerate(ffns.blocks):
            steps += (partial(_attention, weights, i), None), (block.expect, block.submit)
        alike = itertools.groupby(steps, key=lambda step: step[1])
        self._body = [_Stretch([expect for expect, _ in own], submit) for submit, own in alike]
        self._partial = any(block.partial for block in ffns.blocks)
        self._ahead: PassKind | None = None  # the pass that is already expected

    def begin(self, kind: PassKind, next_pass: PassKind) -> None:
        """Start a pass over all layers; `next_pass` guesses the one after it."""
        if not self._partial:  # then passes of few tokens read what others do
            kind, next_pass = replace(kind, wide=True), replace(next_pass, wide=True)
        if self._ahead != kind:
            self.abandon()
            self._expect(kind)
        self._expect(next_pass)
        self._ahead = next_pass

    def abandon(self) -> None:
        """Forget what was read ahead, after a pass that was left half-way, or where another comes."""
        self._ahead = None
        with contextlib.ExitStack() as all_of_them:  # even if one is interrupted
            all_of_them.callback(self._weights.ring.flush)  # last: a kind may still need what its pass had taken
            for kind in self._ffns.kinds:
                all_of_them.callback(kind.cancel)

    def _expect(self, kind: PassKind) -> None:
        ring = self._weights.ring
        for stretch in self._body:
            ring.expect(stretch.blocks(kind.wide), stretch.submit)
        if kind.head:
            ring.expect(self._weights.streamed([self._weights.spec.head]))


def _attention(weights: Weights, i: int, wide: bool) -> Iterator[Block]:
    """What layer `i`'s attention takes, whatever the pass."""
    return weights.streamed((f"{i}.qkv", f"{i}.out"))
