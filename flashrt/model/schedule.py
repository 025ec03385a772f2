"""What passes take from the ring, in the order in which they compute, read ahead across layers and passes."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from flashrt.cache.pages import RingPages
from flashrt.cache.streamer import Submit
from flashrt.cache.weights import Weights
from flashrt.model.ffn.base import FfnBlock
from flashrt.model.ffn.choose import Ffns
from flashrt.storage.layout import Block


@dataclass(frozen=True, slots=True)
class PassKind:
    """A pass over the weights: with the head or without, of many tokens (`wide`) or few."""

    head: bool
    wide: bool
    far: int = 0  # pages of older keys and values that lie before what is in memory


Expect = Callable[[PassKind], Iterable[Block]]  # what a pass takes somewhere


class _Stretch(NamedTuple):
    """Neighbours in the order of a pass whose blocks are read in the same way."""

    expect: Sequence[Expect]
    submit: Submit | None

    def blocks(self, kind: PassKind) -> Iterator[Block]:
        return itertools.chain.from_iterable(expect(kind) for expect in self.expect)


class Schedule:
    """Has the ring of `weights` bring what passes take, `pages` of keys and values among it."""

    def __init__(self, weights: Weights, ffns: Ffns, pages: RingPages | None = None) -> None:
        self._weights, self._ffns, self._pages = weights, ffns, pages
        spec = weights.spec
        beside = ("input_gate", "input_out") if spec.layer_inputs else ()
        steps: list[tuple[Expect, Submit | None]] = []
        if spec.layer_inputs:
            steps.append((partial(_weights, weights, "inputs.project"), None))
        for i, block in enumerate(ffns.blocks):
            mixer = spec.layers[i].mixer
            names = [f"{i}.{name}" for name in mixer.matrices(spec.hidden)]
            inputs, outputs = names[: -mixer.outputs], names[-mixer.outputs :]
            steps += [(partial(_weights, weights, name), None) for name in inputs]
            if pages is not None and (source := spec.kv_layer(i)) in pages.layers:
                steps.append((partial(_far, pages, source), pages.submit(source)))
            steps += [(partial(_weights, weights, name), None) for name in outputs]
            steps.append((partial(_ffn, block), block.submit))
            steps += [(partial(_weights, weights, f"{i}.{name}"), None) for name in beside]
        alike = itertools.groupby(steps, key=lambda step: step[1])
        self._body = [_Stretch([expect for expect, _ in own], submit) for submit, own in alike]
        cells = pages is not None and pages.cells is not None
        self._partial = cells or any(block.partial for block in ffns.blocks)
        self._ahead: PassKind | None = None  # the pass that is already expected
        self._version = 0  # of the pages when it was

    def begin(self, kind: PassKind, next_pass: PassKind) -> None:
        """Start a pass over all layers; `next_pass` guesses the one after it."""
        if not self._partial:  # then passes of few tokens read what others do
            kind, next_pass = replace(kind, wide=True), replace(next_pass, wide=True)
        version = 0 if self._pages is None else self._pages.version
        if self._ahead != kind or self._version != version:
            self.abandon()
            self._expect(kind)
        self._expect(next_pass)
        self._ahead, self._version = next_pass, version

    def abandon(self) -> None:
        """Forget what was read ahead, after a pass that was left half-way, or where another comes."""
        self._ahead = None
        with contextlib.ExitStack() as all_of_them:  # even if one is interrupted
            all_of_them.callback(self._weights.ring.flush)  # last: a kind may still need what its pass had taken
            for kind in self._ffns.kinds:
                all_of_them.callback(kind.cancel)
            if self._pages is not None:
                all_of_them.callback(self._pages.cancel)

    def _expect(self, kind: PassKind) -> None:
        ring = self._weights.ring
        for stretch in self._body:
            ring.expect(stretch.blocks(kind), stretch.submit)
        if kind.head:
            ring.expect(self._weights.streamed([self._weights.spec.head]))


def _weights(weights: Weights, name: str, kind: PassKind) -> Iterator[Block]:
    """A matrix that every pass takes."""
    return weights.streamed([part.name for part in weights.layout.parts(name)])


def _far(pages: RingPages, layer: int, kind: PassKind) -> Iterator[Block]:
    """Keys and values of older positions."""
    return pages.blocks(layer, kind.far, kind.wide)


def _ffn(block: FfnBlock, kind: PassKind) -> Iterable[Block]:
    """What a feed-forward block takes."""
    return block.expect(kind.wide)
