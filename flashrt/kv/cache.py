"""What is kept of one sequence: a store for each layer, of the kind that takes least."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from flashrt.kv.base import Allocate, Kernels, KvLimits, KvStore, LayerStore
from flashrt.kv.choice import Choice
from flashrt.kv.chosen import ChosenStore
from flashrt.kv.contiguous import ContiguousStore
from flashrt.kv.far_layout import FarLayout, cell_bytes, page_bytes
from flashrt.kv.recurrent import RecurrentStore
from flashrt.kv.shared import SharedStore
from flashrt.kv.sparse import SparseStore
from flashrt.kv.streamed import StreamedStore
from flashrt.kv.window import WindowStore
from flashrt.spec import Mixer, ModelSpec
from flashrt_kernels.kv import KvCodec

KvKinds = Sequence[type[LayerStore]]
Choices = Sequence[Choice | None]

RESIDENT_KINDS: KvKinds = (ContiguousStore, WindowStore, SparseStore, SharedStore, RecurrentStore)
KINDS: KvKinds = (*RESIDENT_KINDS, StreamedStore, ChosenStore)


class KvCache:
    """`stores` by layer. Behind `length` they hold garbage, or the rows of a pass that are yet to be committed."""

    def __init__(self, stores: Sequence[LayerStore], capacity: int) -> None:
        self.stores, self.capacity = stores, capacity
        self.recurrent = {i: store for i, store in enumerate(stores) if isinstance(store, RecurrentStore)}
        self.length = 0
        self.top = 0  # the most tokens since it began

    def keys_of(self, layer: int) -> KvStore:
        """The store of a layer that attends, and has keys and values of its own."""
        store = self.stores[layer]
        assert isinstance(store, KvStore)
        return store

    def append(self, count: int) -> None:
        """Make the `count` rows that were written behind the sequence part of it."""
        self.commit(range(count))

    def commit(self, path: Sequence[int]) -> None:
        """Make the rows `path`, ascending, of those written behind the sequence part of it; forget the others."""
        for store in self.stores:
            store.commit(self.length, path)
        self.length += len(path)
        self.top = max(self.top, self.length)

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

    def reach(self, length: int, top: int, states: Sequence[int] | None = None) -> int:
        """How many of the first `length` tokens can be gone on from, in a sequence that has had `top`.

        states: after how many tokens states of recurrent layers are there, elsewhere; None: those that are held
        """
        while (least := self._reach(length, top, states)) < length:
            length = least
        return length

    def _reach(self, length: int, top: int, states: Sequence[int] | None) -> int:
        asked = [store for i, store in enumerate(self.stores) if states is None or i not in self.recurrent]
        least = min((store.truncate(length, top) for store in asked), default=length)
        if states is None or not self.recurrent:
            return least
        return max((position for position in states if position <= least), default=0)

    def mark(self, position: int) -> None:
        """Note that the sequence will probably be cut back to its first `position` tokens."""
        for store in self.stores:
            store.mark(position)

    def marks(self) -> tuple[int, ...]:
        """After how many tokens, ascending, recurrent layers can be gone on from; the end only where it is marked."""
        held = [set(store.marks()) for store in self.recurrent.values()]
        return tuple(sorted(set.intersection(*held))) if held else ()

    def restart(self, firsts: Sequence[int]) -> None:
        """Begin again with nothing; what each store is given next stands from its place in `firsts` on.

        Of a recurrent layer that is where the sequence ends.
        """
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

    def restored(self, length: int, top: int, marks: Sequence[int] = ()) -> None:
        """The stores were given what is needed of the first `length` tokens of a sequence that has had `top`.

        marks: after how many tokens recurrent layers can be gone on from besides
        """
        for store in self.recurrent.values():
            store.restored(marks)
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
    for layer, (mixer, own) in enumerate(_layers(spec, limits, choices)):
        pages = None if kernels.pages is None else partial(kernels.pages, layer)
        stores.append(choose(mixer, own, kinds)[0](mixer, own, kernels._replace(pages=pages), allocate))
    return KvCache(stores, limits.context)


def kv_bytes(spec: ModelSpec, limits: KvLimits, kinds: KvKinds = KINDS, choices: Choices = ()) -> int:
    """Bytes that `open_cache` allocates."""
    total = 0
    for mixer, own in _layers(spec, limits, choices):
        kind, nbytes = choose(mixer, own, kinds)
        total += nbytes + kind.beside(mixer, own)
    return total


def kv_scratch_bytes(spec: ModelSpec, limits: KvLimits, ops: Any, kinds: KvKinds = KINDS, choices: Choices = ()) -> int:
    """Bytes of scratch that the stores of `open_cache` need, beside what attention over all positions does."""
    needs = (
        choose(mixer, own, kinds)[0].scratch_bytes(mixer, own, ops)
        for mixer, own in set(_layers(spec, limits, choices))
    )
    return max(needs, default=0)


def far_layout(spec: ModelSpec, limits: KvLimits, kinds: KvKinds = KINDS, choices: Choices = ()) -> FarLayout | None:
    """The pages of older positions of the stores of `open_cache`; None where all are in memory."""
    nbytes, heads, count = {}, {}, 0
    readers = Counter(map(spec.kv_layer, spec.attentions))
    for layer, (mixer, own) in enumerate(_layers(spec, limits, choices)):
        kind = choose(mixer, own, kinds)[0]
        if pages := kind.far_pages(mixer, own):
            attention = spec.attentions[layer]
            nbytes[layer], count = page_bytes(attention, limits.codec), max(count, pages)
            if kind.cells(mixer, own):
                heads[layer] = attention.kv_heads
    return FarLayout(nbytes, limits.held or 0, count, heads, limits.cell_bytes, readers) if nbytes else None


def cells_chosen(spec: ModelSpec, limits: KvLimits, kinds: KvKinds = KINDS, choices: Choices = ()) -> list[int]:
    """Cells that a token chooses in each layer at the end of the context."""
    return [choose(mixer, own, kinds)[0].cells(mixer, own) for mixer, own in _layers(spec, limits, choices)]


def kv_cell_bytes(spec: ModelSpec, codec: KvCodec, choices: Choices) -> int:
    """Bytes of a cell of the layers that choose; 0 where there are none, or no number of bytes serves them all."""
    pairs = [(layer.attention, choice) for layer, choice in zip(spec.layers, choices, strict=False) if choice]
    blocks = {choice.block for _, choice in pairs}
    if len(blocks) != 1:
        return 0
    return cell_bytes([attention for attention, _ in pairs], blocks.pop(), codec)


def choose(mixer: Mixer, limits: KvLimits, kinds: KvKinds) -> tuple[type[LayerStore], int]:
    """The kind that takes least, the first of those equal, and the bytes that it takes."""
    able = [kind for kind in kinds if isinstance(mixer, kind.holds)]
    claims = [(kind, claim) for kind in able if (claim := kind.claim(mixer, limits)) is not None]
    if not claims:
        raise ValueError(f"none of {[kind.__name__ for kind in kinds]} holds what {mixer} needs")
    return min(claims, key=lambda pair: pair[1])


def _layers(spec: ModelSpec, limits: KvLimits, choices: Choices) -> Iterator[tuple[Mixer, KvLimits]]:
    """What each layer's store must hold."""
    for layer, choice in itertools.zip_longest(spec.layers, choices):
        yield layer.mixer, replace(limits, choice=choice)
