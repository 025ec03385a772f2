"""Keys and values of a sequence in pages: which there are, and in which order. Lengths decide, never a store."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flashrt.kv.reach import needed
from flashrt.spec import Attention
from flashrt_kernels.kv import KvCodec
from flashrt_kernels.limits import ATTENTION_SEGMENT

PAGE_BYTES = 256 << 10  # what a page may take, where one KV head does not take more


@dataclass(frozen=True, slots=True)
class Extent:
    """The positions from `begin`, the first of a segment, to `length`, of a sequence that has had `top` tokens."""

    begin: int
    length: int
    top: int


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


def pages(attentions: Sequence[Attention], extent: Extent, codec: KvCodec) -> Iterator[Page]:
    """All that is held for certain of an extent, whatever the stores: segment by segment, then by layer and head.

    attentions: of the layers. Of a layer that sees a window these are its last segments only (`reach.needed`).
    """
    for begin in range(extent.begin, extent.length, ATTENTION_SEGMENT):
        count = min(ATTENTION_SEGMENT, extent.length - begin)
        for layer, attention in enumerate(attentions):
            if begin < needed(attention.window, extent.top):
                continue
            group = max(PAGE_BYTES // (ATTENTION_SEGMENT * codec.nbytes(attention.head_dim)), 1)
            for head in range(0, attention.kv_heads, group):
                heads = slice(head, min(head + group, attention.kv_heads))
                yield Page(layer, begin, heads, (heads.stop - head, count, *codec.pair(attention.head_dim)))
