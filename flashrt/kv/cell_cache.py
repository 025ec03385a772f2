"""Cells of keys and values from disk, in slots that were allocated beforehand and that all layers compete for.

A cell is so many neighbours of a KV head as fill whole pages of a disk (`flashrt.kv.far_layout`).

What is given up is what is wanted last if every layer chooses what it chose before (Belady, "A study of replacement
algorithms for a virtual-storage computer", 1966). Layers take turns in one order. So a cell that its layer did not
choose at its last turn goes first, the longest unused before others; then those of the layer whose turn was last.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from flashrt.errors import FlashrtError
from flashrt.kv.guesses import Guesses

Array = np.ndarray

QUEUE_SHARE = 32  # the queue of those to be given up next is made anew for this part of all slots
NEVER = -(1 << 40)  # the turn at which an empty slot was used


class Reading(Protocol):
    """Reads under way; see `flashrt.storage.reader.Ticket`."""

    def wait(self) -> None: ...


# Starts reading cells of a layer (int64 [n], KV head * cells of the context + cell) into slots (int64 [n]).
Read = Callable[[int, Array, Array], Reading]
Allocate = Callable[..., Array]  # zeroed memory of a shape and type


class _Flight(NamedTuple):
    """What is being read of a layer, and the slots that it goes to."""

    layer: int
    reading: Reading
    slots: Array


class _Wanted(NamedTuple):
    """Slots of a part's cells, and what is being read of their layer since they were wanted, or before."""

    slots: Array
    flights: list[_Flight]


class CellCache:
    """`slots` slots for cells of `layers` layers, each of which has `cells` cells over all KV heads.

    `counts` says how many cells that were wanted were there (hits) or not (misses), how many began to be read before
    they were wanted (ahead), and how many of these were wanted then (useful).
    """

    def __init__(self, slots: int, layers: int, cells: int, read: Read, allocate: Allocate = np.zeros) -> None:
        self.slots, self.cells, self._read = slots, cells, read
        self._slot = allocate((layers, cells), np.int32)  # that holds a cell, or is being filled with it
        self._owner = allocate((slots,), np.int64)  # layer * cells + cell
        self._used = allocate((slots,), np.int64)  # the turn at which its cell was wanted last
        self._slot[:], self._owner[:], self._used[:] = -1, -1, NEVER
        self._layers, self._turn = layers, 0
        self._queue = np.zeros(0, np.int64)  # slots in the order in which they are given up
        self._queued = np.zeros(0, np.int64)  # turns at which these had been used when it was made
        self._held = allocate((slots,), np.bool_)  # wanted now: may not be given up
        self._filling = allocate((slots,), np.bool_)  # nor may what is being filled
        self._ahead = allocate((slots,), np.bool_)  # read before it was wanted
        self._flying: list[_Flight] = []
        self.guesses = Guesses(layers)
        self.counts: Counter[str] = Counter()
        self.wait_s = 0.0

    @classmethod
    def nbytes(cls, slots: int, layers: int, cells: int) -> int:
        """Bytes that it takes beside the cells: what it allocates, and a queue of all slots while that is made."""
        return 4 * layers * cells + (8 + 8 + 3 + 32) * slots

    def fetch(self, layer: int, cells: Array) -> Array:
        """Slots (int32 [n]) that hold these cells, all different, of a layer; valid until the next call.

        Returns when all are there. n is at most `slots`.
        """
        (slots,) = self.fetch_parts(layer, [cells])
        return slots

    def fetch_parts(self, layer: int, parts: Iterable[Array]) -> Iterator[Array]:
        """Slots of one part's cells after the other's: the next part begins to be read before one is waited for.

        The parts of a layer are `slots` cells at most, all different. Slots are valid until the next call.
        """
        self._turn += 1
        self._held[:] = False  # an interrupt may have left a turn half-way
        turn, waited, before = self._turn, self.wait_s, self.counts.copy()
        begun: _Wanted | None = None
        try:
            for cells in parts:
                last, begun = begun, self._want(layer, cells)
                if last is not None:
                    yield self._arrived(last)
            if begun is not None:
                yield self._arrived(begun)
        finally:
            if turn == self._turn:
                self._held[:] = False
        missed, useful = (self.counts[name] - before[name] for name in ("misses", "useful"))
        self.guesses.fetched(missed, useful, self.wait_s - waited)

    def prefetch(self, layer: int, cells: Array) -> None:
        """Start reading those of a layer's cells that are not there, as far as slots allow."""
        missing = cells[self._slot[layer, cells] < 0][: self.slots // 4]
        if len(missing):
            self._arrive()
            slots = self._begin(layer, missing)
            self._ahead[slots] = True
            self._used[slots] = self._turn + 1 - self._layers  # as if at the last turn of a layer whose turn is next
            self.counts["ahead"] += len(missing)

    def drop(self, layer: int, cells: Array | slice) -> None:
        """Forget cells of a layer that are about to change on disk, and what is being read."""
        self.cancel()
        slots = self._slot[layer, cells]
        self._forget(slots[slots >= 0])

    def cancel(self) -> None:
        """Forget what is being read, after a pass that was left half-way: an interrupt may have struck anywhere."""
        while self._flying:
            flight = self._flying[-1]
            self._forget(flight.slots)
            with contextlib.suppress(FlashrtError):
                flight.reading.wait()
            self._flying.pop()
        self._held[:] = self._filling[:] = False
        self._queue = self._queued = self._queue[:0]

    def _want(self, layer: int, cells: Array) -> _Wanted:
        """Hold what is there of a layer's cells, and begin to read the others."""
        slots = self._slot[layer, cells]
        there = slots >= 0
        hits, missing = slots[there], cells[~there]
        self._used[hits] = self._turn
        self.counts["hits"] += len(hits)
        self.counts["useful"] += int(self._ahead[hits].sum())
        self.counts["misses"] += len(missing)
        self._ahead[hits] = False
        self._held[hits] = True
        if len(missing):
            if len(missing) > self.slots - int((self._held | self._filling).sum()):
                self._arrive()
            slots[~there] = self._begin(layer, missing)
            self._held[slots] = True
        return _Wanted(slots, [flight for flight in self._flying if flight.layer == layer])

    def _arrived(self, wanted: _Wanted) -> Array:
        self._arrive([flight for flight in wanted.flights if any(flight is other for other in self._flying)])
        return wanted.slots

    def _begin(self, layer: int, cells: Array) -> Array:
        """Read cells that are not there; the slots that they go to."""
        slots = self._free(len(cells))
        self._forget(slots)
        self._filling[slots] = True
        self._flying.append(_Flight(layer, self._read(layer, cells, slots.astype(np.int64)), slots))
        self._owner[slots] = layer * self.cells + cells
        self._slot[layer, cells] = slots
        self._used[slots] = self._turn
        self._ahead[slots] = False
        return slots

    def _arrive(self, flights: Sequence[_Flight] | None = None) -> None:
        """Wait for what is being read: for these, or for all."""
        began = time.perf_counter()
        for flight in list(self._flying) if flights is None else flights:
            try:
                flight.reading.wait()
            except BaseException:
                self.cancel()
                raise
            self._filling[flight.slots] = False
            self._flying = [other for other in self._flying if other is not flight]
        self.wait_s += time.perf_counter() - began

    def _forget(self, slots: Array) -> None:
        owners = self._owner[slots]
        self._slot.reshape(-1)[owners[owners >= 0]] = -1
        self._owner[slots] = -1
        self._used[slots] = NEVER

    def _free(self, count: int) -> Array:
        """Slots to give up, int32 [count]. Raises ValueError where fewer are not held."""
        found: list[Array] = []
        for fresh in (False, True):
            if fresh:
                self._line_up(count)
            usable = (self._used[self._queue] == self._queued) & ~(self._held | self._filling)[self._queue]
            place = np.flatnonzero(usable)[:count]
            found.append(self._queue[place])
            count -= len(place)
            used = int(place[-1]) + 1 if count == 0 and len(place) else len(self._queue)
            self._queue, self._queued = self._queue[used:], self._queued[used:]
            if count == 0:
                return np.concatenate(found).astype(np.int32)
            self._filling[found[-1]] = True  # so that they are not found again
        raise ValueError(f"a cache of {self.slots} cells cannot hold {count} more")

    def _line_up(self, count: int) -> None:
        """Make the queue anew, for `count` slots at least."""
        delay = self._delay(self._turn - self._used)
        delay[self._held | self._filling] = -1
        some = min(count + self.slots // QUEUE_SHARE, self.slots)
        last = np.argpartition(delay, self.slots - some)[self.slots - some :]
        self._queue = last[np.argsort(-delay[last], kind="stable")]
        self._queued = self._used[self._queue]

    def _delay(self, age: Array) -> Array:
        """How long each slot's cell will not be wanted, from how many turns ago it was: in the order of that."""
        return np.where(age > self._layers, age, self._layers - age)
