"""Keys and values of one sequence: a store for each layer, of the kind that takes least."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from flashrt.kv.base import Allocate, Kernels, KvLimits, KvStore
from flashrt.kv.choice import Choice
from flashrt.kv.chosen import ChosenStore
from flashrt.kv.contiguous import ContiguousStore
from flashrt.kv.far_layout import FarLayout, cell_bytes, page_bytes
from flashrt.kv.sparse import SparseStore
from flashrt.kv.streamed import StreamedStore
from flashrt.kv.window import WindowStore
from flashrt.spec import Attention, ModelSpec
from flashrt_kernels.kv import KvCodec

KvKinds = Sequence[type[KvStore]]
Choices = Sequence[Choice | None]

RESIDENT_KINDS: KvKinds = (ContiguousStore, WindowStore, SparseStore)
KINDS: KvKinds = (*RESIDENT_KINDS, StreamedStore, ChosenStore)


class KvCache:
    """`stores` by layer. Behind `length` they hold garbage, or the rows of a pass that are yet to be committed."""

    def __init__(self, stores: Sequence[KvStore], capacity: int) -> None:
        self.stores, self.capacity = stores, capacity
        self.length = 0
        self.top = 0  # the most tokens since it began

    def append(self, count: int) -> None:
        """Make the `count` rows that were written behind the sequence part of it."""
        self.length += count
        self.top = max(self.top, self.length)

    def commit(self, path: Sequence[int]) -> None:
        """Make the rows `path`, ascending, of those written behind the sequence part of it; forget the others."""
        for store in self.stores:
            store.commit(self.length, path)
        self.append(len(path))

    def truncate(self, length: int) -> int:
        """Cut the sequence back to its first `length` tokens, or to as many of these as can be gone on from.

        Returns how many that are. Raises DiskError.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot cut a sequence of {self.length} tokens back to {length}")
        self.length = self.reach(length, self.top)
        if self.length == 0:  # what an interrupt leaves of this, the next call makes good
            self.restart([0] * len(self.stores))
        for store in self.stores:
            store.cut(self.length)
        return self.length

    def reach(self, length: int, top: int) -> int:
        """How many of the first `length` tokens can be gone on from, in a sequence that has had `top`."""
        while (least := min((store.truncate(length, top) for store in self.stores), default=length)) < length:
            length = least
        return length

    def restart(self, firsts: Sequence[int]) -> None:
        """Begin again with nothing; what each store is given next stands from its place in `firsts` on."""
        self.length = self.top = 0
        for store, first in zip(self.stores, firsts, strict=True):
            store.restart(first)

    def far(self, start: int, rows: int) -> int:
        """Pages on disk or held that lie before what is in memory in a pass of `rows` rows from `start` on."""
        return max((store.far(start, rows) for store in self.stores), default=0)

    def close(self) -> None:
        """Give up what is not memory. Closing again does nothing."""
        for store in self.stores:
            store.close()

    def restored(self, length: int, top: int) -> None:
        """The stores were given what is needed of the first `length` tokens of a sequence that has had `top`."""
        self.length, self.top = length, top


def open_cache(
    spec: ModelSpec,
    limits: KvLimits,
    kernels: Kernels,
    allocate: Allocate,
    kinds: KvKinds = KINDS,
    choices: Choices = (),
) -> KvCache:
    """An empty cache for a sequence of `spec`; `choices` by layer, none: all attend to everything."""
    stores = []
    for layer, (attention, own) in enumerate(_layers(spec, limits, choices)):
        pages = None if kernels.pages is None else partial(kernels.pages, layer)
        stores.append(choose(attention, own, kinds)[0](attention, own, kernels._replace(pages=pages), allocate))
    return KvCache(stores, limits.context)


def kv_bytes(spec: ModelSpec, limits: KvLimits, kinds: KvKinds = KINDS, choices: Choices = ()) -> int:
    """Bytes that `open_cache` allocates."""
    total = 0
    for attention, own in _layers(spec, limits, choices):
        kind, nbytes = choose(attention, own, kinds)
        total += nbytes + kind.beside(attention, own)
    return total


def kv_scratch_bytes(spec: ModelSpec, limits: KvLimits, ops: Any, kinds: KvKinds = KINDS, choices: Choices = ()) -> int:
    """Bytes of scratch that the stores of `open_cache` need, beside what attention over all positions does."""
    needs = (
        choose(attention, own, kinds)[0].scratch_bytes(attention, own, ops)
        for attention, own in set(_layers(spec, limits, choices))
    )
    return max(needs, default=0)


def far_layout(spec: ModelSpec, limits: KvLimits, kinds: KvKinds = KINDS, choices: Choices = ()) -> FarLayout | None:
    """The pages of older positions of the stores of `open_cache`; None where all are in memory."""
    nbytes, heads, count = {}, {}, 0
    for layer, (attention, own) in enumerate(_layers(spec, limits, choices)):
        kind = choose(attention, own, kinds)[0]
        if pages := kind.far_pages(attention, own):
            nbytes[layer], count = page_bytes(attention, limits.codec), max(count, pages)
            if kind.cells(attention, own):
                heads[layer] = attention.kv_heads
    return FarLayout(nbytes, limits.held or 0, count, heads, limits.cell_bytes) if nbytes else None


def cells_chosen(spec: ModelSpec, limits: KvLimits, kinds: KvKinds = KINDS, choices: Choices = ()) -> list[int]:
    """Cells that a token chooses in each layer at the end of the context."""
    return [choose(attention, own, kinds)[0].cells(attention, own) for attention, own in _layers(spec, limits, choices)]


def kv_cell_bytes(spec: ModelSpec, codec: KvCodec, choices: Choices) -> int:
    """Bytes of a cell of the layers that choose; 0 where there are none, or no number of bytes serves them all."""
    pairs = [(layer.attention, choice) for layer, choice in zip(spec.layers, choices, strict=False) if choice]
    blocks = {choice.block for _, choice in pairs}
    if len(blocks) != 1:
        return 0
    return cell_bytes([attention for attention, _ in pairs], blocks.pop(), codec)


def choose(attention: Attention, limits: KvLimits, kinds: KvKinds) -> tuple[type[KvStore], int]:
    """The kind that takes least, the first of those equal, and the bytes that it takes."""
    claims = [(kind, claim) for kind in kinds if (claim := kind.claim(attention, limits)) is not None]
    if not claims:
        raise ValueError(f"none of {[kind.__name__ for kind in kinds]} holds keys and values of {attention}")
    return min(claims, key=lambda pair: pair[1])


def _layers(spec: ModelSpec, limits: KvLimits, choices: Choices) -> Iterator[tuple[Attention, KvLimits]]:
    """What each layer's store must hold."""
    for layer, choice in itertools.zip_longest(spec.layers, choices):
        yield layer.attention, replace(limits, choice=choice)
