"""What is kept of a sequence in pages: which there are, and in which order. Lengths decide, never a store."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flashrt.kv.reach import needed
from flashrt.spec import Attention, DeltaNet, Mixer
from flashrt_kernels.kv import KvCodec
from flashrt_kernels.limits import ATTENTION_SEGMENT

PAGE_BYTES = 256 << 10  # what a page may take, where one KV head does not take more


@dataclass(frozen=True, slots=True)
class Extent:
    """The positions from `begin`, the first of a segment, to `length`, of a sequence that has had `top` tokens."""

    begin: int
    length: int
    top: int
    marks: tuple[int, ...] = ()  # after how many tokens, ascending, recurrent layers can be gone on from besides
    ends: bool = False  # whether states of recurrent layers at its end are part of it

    @property
    def states(self) -> tuple[int, ...]:
        """After how many tokens, ascending, states of recurrent layers are part of it."""
        end = {self.length} if self.ends else set()
        return tuple(sorted(end | {mark for mark in self.marks if self.begin < mark <= self.length}))


@dataclass(frozen=True, slots=True)
class Page:
    """Positions of one segment, from its first, `begin`, on, of some KV heads of one layer."""

    layer: int
    begin: int
    heads: slice
    shape: tuple[int, int, int, int]  # [heads, positions, *pair]

    @property
    def items(self) -> int:
        """Items of stores in it."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class StatePage:
    """Some numbers, float32, of the state of a recurrent layer after `position` tokens."""

    layer: int
    position: int
    part: slice

    @property
    def items(self) -> int:
        """Numbers in it."""
        return self.part.stop - self.part.start

    @property
    def shape(self) -> tuple[int]:
        return (self.items,)


def firsts(mixers: Sequence[Mixer], length: int, top: int) -> list[int]:
    """Where what each layer keeps of a sequence of `length` tokens, that has had `top`, begins.

    Of a layer that attends that is the first position which is needed; of a recurrent one, the end.
    """
    return [needed(mixer.window, top) if isinstance(mixer, Attention) else length for mixer in mixers]


def pages(mixers: Sequence[Mixer], extent: Extent, codec: KvCodec) -> Iterator[Page | StatePage]:
    """All that is held for certain of an extent, whatever the stores.

    Segment by segment, then by layer and head; states behind the keys and values of the segment that they end in. Of a
    layer that sees a window these are its last segments only (`reach.needed`).
    """
    for begin in range(extent.begin, extent.length, ATTENTION_SEGMENT):
        yield from _segment(mixers, extent, codec, begin)
        for position in extent.states:
            if begin < position <= begin + ATTENTION_SEGMENT:
                yield from _states(mixers, position)


def _segment(mixers: Sequence[Mixer], extent: Extent, codec: KvCodec, begin: int) -> Iterator[Page]:
    count = min(ATTENTION_SEGMENT, extent.length - begin)
    for layer, attention in enumerate(mixers):
        if not isinstance(attention, Attention) or attention.kv_from is not None:
            continue
        if begin < needed(attention.window, extent.top):
            continue
        group = max(PAGE_BYTES // (ATTENTION_SEGMENT * attention.kv_bytes(codec) // attention.kv_heads), 1)
        for head in range(0, attention.kv_heads, group):
            heads = slice(head, min(head + group, attention.kv_heads))
            yield Page(layer, begin, heads, (heads.stop - head, count, *attention.kv_pair(codec)))


def _states(mixers: Sequence[Mixer], position: int) -> Iterator[StatePage]:
    step = PAGE_BYTES // 4
    for layer, net in enumerate(mixers):
        if isinstance(net, DeltaNet):
            for first in range(0, net.state_size, step):
                yield StatePage(layer, position, slice(first, min(first + step, net.state_size)))
