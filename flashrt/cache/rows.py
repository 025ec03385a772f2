"""The neurons of one layer that are in memory: hot ones pinned, beside them those that recent tokens needed.

A window of recent tokens holds most of what the next one needs (LLM in a Flash, section 3.2, "sliding window"). Here
memory is fixed and the window is as long as that allows: a row leaves when its slot is needed and nothing else was used
longer ago. Work per token is in proportion to the rows it asks for, whatever the size of layer and cache.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from flashrt.budget.claims.rows import QUEUE_FACTOR, least_slots
from flashrt.cache.verification import Verifier
from flashrt.errors import BudgetError
from flashrt.storage.layout import TensorLayout
from flashrt.storage.reader import Reader, Ticket
from flashrt_kernels.limits import NEURON_STEP

Array = np.ndarray

SEARCH = 8  # entries that are looked through at once for each slot that is needed


class Pass(NamedTuple):
    """Rows that are in memory together, ascending, and where: int32 [n] each."""

    rows: Array
    slots: Array


@dataclass(slots=True)
class RowStatistics:
    """Counts since the cache was made: asked = pinned_hits + hits + misses; useful <= prefetched."""

    asked: int = 0  # rows
    pinned_hits: int = 0
    hits: int = 0  # in the window, or already on their way
    misses: int = 0
    prefetched: int = 0  # rows that were read because somebody guessed them
    useful: int = 0  # of these, those that were asked for before they left
    bytes_wanted: int = 0  # of the rows that were read
    bytes_read: int = 0  # what came from the disk for them: rest of pages and gaps included
    wait_s: float = 0.0


class RowCache:
    """Bundles of the dense FFN `tensor` in `memory` (uint8 [slots, stride]); the first `pinned` rows stay.

    The pinned rows must be in memory before anything else: `load` reads them. `statistics` counts. Raises BudgetError
    for fewer slots than `least_slots`.

    The order in which rows are handed out depends on what is asked for only, never on what was in memory.
    """

    def __init__(
        self,
        reader: Reader,
        verifier: Verifier,
        tensor: TensorLayout,
        memory: Array,
        pinned: int,
    ) -> None:
        self.tensor, self.memory, self.pinned = tensor, memory, pinned
        self.neurons, self.window = tensor.run_bundles, len(memory) - pinned
        self._require_room()
        self.statistics = RowStatistics()
        self._reader, self._verifier = reader, verifier
        self._unverified = set(range(tensor.blocks))  # as far as is known here
        self._flying: deque[tuple[Ticket, Array]] = deque()  # reads under way, and the slots that they fill
        # An empty slot's row is -1, so the slot of "row -1" is kept as well, and means nothing.
        self._slot_of = np.full(self.neurons + 1, -1, np.int32)
        self._row_in = np.full(len(memory), -1, np.int32)
        self._row_in[:pinned] = np.arange(pinned)
        self._arriving = np.zeros(len(memory), bool)
        self._guessed = np.zeros(len(memory), bool)  # and not asked for yet
        # Slots of the window in the order of use. Used again, a slot gets a new entry; `_place` says which one counts.
        self._queue = np.zeros(QUEUE_FACTOR * self.window, np.int32)
        self._place = np.full(len(memory), -1, np.int32)
        self._head = self._tail = 0
        self._rebuild()

    def load(self) -> None:
        """Read the pinned rows. Raises PackError, DiskError."""
        tensor, whole = self.tensor, self.pinned // self.tensor.block_bundles
        blocks = [tensor.block(i) for i in range(whole)]
        tickets = [
            self._reader.submit(block, self.memory[block.first : block.first + block.bundles].reshape(-1))
            for block in blocks
        ]
        for ticket in tickets:
            ticket.wait()
        rest = np.arange(whole * tensor.block_bundles, self.pinned)
        self._submit(rest, rest).wait()

    def ensure(self, rows: Array) -> Iterator[Pass]:
        """Bring `rows` (int32, ascending) into memory; yields passes that together hold them all, in order.

        Each pass but the last has a multiple of 128 rows, so that kernels sum as they would over all rows at once. The
        first comes while others are still being read. A pass is valid until the next one, or the next call. Rows
        beyond the size of the window come in several passes. Raises ValueError for rows that are not ascending or
        that the layer has not, PackError and DiskError; what could not be read is then absent.
        """
        for part in self._parts(self._checked(rows)):
            slots, absent = self._request(part)
            self._count(slots, len(absent))
            ready = self._ready(slots)
            if ready > 0:
                yield Pass(part[:ready], slots[:ready])
            if ready < len(part):
                self._land(wait=True)
                yield Pass(part[ready:], slots[ready:])

    def prefetch(self, rows: Array) -> None:
        """Start to read those of `rows` (int32, ascending) that are absent, as many as fit. Nothing waits for them.

        They count as used, so they stay until the next `ensure`. Invalidates the pass handed out last.
        """
        for part in self._parts(self._checked(rows)):
            slots, started = self._request(part)
            self.statistics.prefetched += len(started)
            self._guessed[slots[started]] = True
            break

    def abandon(self) -> None:
        """Forget what is being read, after a failure or an interrupt; the rows that have arrived stay."""
        for ticket, _ in self._flying:
            ticket.cancel()
        self._reader.settle()
        self._flying.clear()
        self._rebuild()

    def check_integrity(self) -> None:
        """Assert that the parts of the index agree with each other and with the counts."""
        held = np.flatnonzero(self._row_in >= 0)
        rows = self._row_in[held]
        assert len(np.unique(rows)) == len(rows), "a row is in two slots"
        assert (self._slot_of[rows] == held).all(), "the map does not lead to the slot of a row"
        assert np.count_nonzero(self._slot_of[:-1] >= 0) == len(rows), "the map knows rows that no slot has"
        assert (self._row_in[: self.pinned] == np.arange(self.pinned)).all(), "a pinned row has gone"
        queued = self._live()
        assert sorted(queued) == list(range(self.pinned, len(self.memory))), "a slot is not queued exactly once"
        flying = np.concatenate([np.zeros(0, np.int64), *(slots for _, slots in self._flying)])
        assert len(np.unique(flying)) == len(flying), "two reads fill the same slot"
        assert sorted(flying) == np.flatnonzero(self._arriving).tolist(), "a slot waits for a read that nobody made"
        count = self.statistics
        assert count.asked == count.pinned_hits + count.hits + count.misses, "the counts do not add up"
        assert count.useful + np.count_nonzero(self._guessed) <= count.prefetched, "a guess counts twice"
        assert count.bytes_wanted == (count.misses + count.prefetched) * self.tensor.stride, "rows were read uncounted"

    def _require_room(self) -> None:
        if self.tensor.runs != 1:
            raise ValueError(f"{self.tensor.name} is a mixture of experts: its neurons are not cached one by one")
        least = least_slots(self.neurons, self.pinned)
        if not 0 <= self.pinned <= self.neurons or len(self.memory) < least:
            raise BudgetError(
                f"{self.tensor.name} has memory for {len(self.memory)} neurons, {self.pinned} of {self.neurons} to be "
                f"pinned: it takes {least} at least. Use a larger --budget-gb"
            )

    def _checked(self, rows: Array) -> Array:
        if len(rows) and (rows[0] < 0 or rows[-1] >= self.neurons or (rows[1:] <= rows[:-1]).any()):
            raise ValueError(f"expected ascending rows below {self.neurons} of {self.tensor.name}")
        return rows

    def _parts(self, rows: Array) -> Iterator[Array]:
        """Cut rows such that the window holds those of each part; by the rows alone, at multiples of 128."""
        pinned, begin = self._pinned_among(rows), 0
        while begin < len(rows):
            end = max(pinned, begin) + self.window
            if end < len(rows):
                end -= (end - begin) % NEURON_STEP
            yield rows[begin:end]
            begin = end

    def _request(self, rows: Array) -> tuple[Array, Array]:
        """Slots of rows that fit, and the places among them of those that have just been asked of the disk."""
        try:
            self._land(wait=False)
            slots, pinned = self._slot_of[rows], self._pinned_among(rows)
            window = slots[pinned:]  # a view
            missing = window < 0
            absent = missing.nonzero()[0]
            if len(absent):
                self._place[window[~missing]] = -1  # these entries no longer count, so the slots are not taken
                taken = self._take(len(absent))
                window[absent] = taken
                self._enqueue(window)
                self._read(rows[pinned:][absent], taken)
            else:
                self._enqueue(window)
        except BaseException:
            self.abandon()
            raise
        return slots, absent + pinned

    def _read(self, rows: Array, slots: Array) -> None:
        """Start to read rows into slots, whatever was there. At no point is a slot taken for what it does not hold."""
        if self._flying and self._arriving[slots].any():
            self._land(wait=True)  # a guess that was not used is still being read into one of them
        self._arriving[slots], self._guessed[slots] = True, False
        self._slot_of[self._row_in[slots]] = -1
        self._row_in[slots] = rows
        self._slot_of[rows] = slots
        self._flying.append((self._submit(rows, slots), slots))
        self.statistics.bytes_wanted += len(rows) * self.tensor.stride

    def _submit(self, rows: Array, slots: Array) -> Ticket:
        if self._unverified:
            self._verify(rows)
        offsets = self.tensor.offset + rows.astype(np.int64) * self.tensor.stride
        return self._reader.submit_rows(self.tensor.file, offsets, self.memory, slots.astype(np.int64))

    def _verify(self, rows: Array) -> None:
        """Have the blocks checked that are touched for the first time."""
        fresh = self._unverified.intersection((rows // self.tensor.block_bundles).tolist())
        self._verifier.check(self.tensor, sorted(fresh))
        self._unverified -= fresh

    def _land(self, wait: bool) -> None:
        """Take note of reads that are over; with `wait`, of all."""
        while self._flying and (wait or self._flying[0][0].ready):
            ticket, slots = self._flying[0]
            began = time.perf_counter()
            try:
                ticket.wait()
            except BaseException:
                self.abandon()
                raise
            self._arriving[slots] = False
            self._flying.popleft()
            self.statistics.wait_s += time.perf_counter() - began
            self.statistics.bytes_read += ticket.bytes_read

    def _ready(self, slots: Array) -> int:
        """How many of the leading rows can be worked on now: all, or a multiple of 128."""
        late = self._arriving[slots]
        first = int(late.argmax())
        return first // NEURON_STEP * NEURON_STEP if late[first] else len(slots)

    def _count(self, slots: Array, misses: int) -> None:
        count, pinned = self.statistics, int(np.count_nonzero(slots < self.pinned))
        count.asked += len(slots)
        count.pinned_hits += pinned
        count.hits += len(slots) - pinned - misses
        count.misses += misses
        guessed = int(np.count_nonzero(self._guessed[slots]))
        self._guessed[slots] = False
        count.useful += guessed

    def _pinned_among(self, rows: Array) -> int:
        """How many of ascending rows are pinned: they come first."""
        return int(rows.searchsorted(np.int32(self.pinned)))  # an int64 would have all rows converted

    def _take(self, count: int) -> Array:
        """The `count` slots that were used longest ago, off the queue."""
        taken = []
        while count > 0:
            begin, end = self._head, min(self._head + SEARCH * count, self._tail)
            slots = self._queue[begin:end]
            found = (self._place[slots] == np.arange(begin, end, dtype=np.int32)).nonzero()[0][:count]
            taken.append(slots[found])
            count -= len(found)
            self._head = end if count > 0 else begin + int(found[-1]) + 1
        return taken[0] if len(taken) == 1 else np.concatenate(taken)

    def _enqueue(self, slots: Array) -> None:
        """Put slots of ascending rows, each once, at the end of the queue; of one token's, the coldest leaves first."""
        slots = slots[::-1]
        if self._tail + len(slots) > len(self._queue):
            self._place[slots] = -1
            self._requeue(self._live())
        begin, self._tail = self._tail, self._tail + len(slots)
        self._queue[begin : self._tail] = slots
        self._place[slots] = np.arange(begin, self._tail, dtype=np.int32)

    def _live(self) -> Array:
        """The queue without outdated entries."""
        slots = self._queue[self._head : self._tail]
        return slots[self._place[slots] == np.arange(self._head, self._tail)]

    def _requeue(self, slots: Array) -> None:
        self._head, self._tail = 0, len(slots)
        self._queue[: len(slots)] = slots
        self._place[slots] = np.arange(len(slots))

    def _rebuild(self) -> None:
        """Derive map and queue from the rows in slots, of which those still arriving are lost.

        Nothing else is relied on: an interrupt may have struck between any two steps.
        """
        self._row_in[self._arriving] = -1
        self._guessed[self._arriving] = self._arriving[:] = False
        self._slot_of[:] = -1
        held = np.flatnonzero(self._row_in >= 0)
        self._slot_of[self._row_in[held]] = held
        self._place[self._row_in < 0] = -1  # empty slots are taken first
        self._requeue(self.pinned + np.argsort(self._place[self.pinned :], kind="stable").astype(np.int32))
