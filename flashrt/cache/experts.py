"""A mixture's experts in memory: whole ones, in slots that were allocated beforehand.

What a router names is read into a slot unless it is there. The slot given up is that of the expert least likely to be
named again (`cache.forecast`), all layers competing for all slots. While a layer computes, experts that the next one
will probably need are read ahead (Eliseev and Mazur, arXiv:2312.17238, section 3.2); what turns out wrong is cancelled.
None of this changes a result: bytes are the same wherever they come from, and experts are taken in one order.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from flashrt.cache.device import BlockStream, Device, Progress, Reading, Tensor
from flashrt.cache.forecast import Forecast
from flashrt.errors import FlashrtError
from flashrt.storage.layout import PAGE, Block

Array = np.ndarray
Key = tuple[int, int]  # layer, expert

Blocks = Callable[[int, int], Sequence[Block]]  # what there is to read of an expert of a layer

AHEAD_BYTES = 16 << 20  # read beyond the expert in use: twice what the reader has in flight, so that it never runs dry


class ExpertStream:
    """Experts that stay nowhere: what a router names is read through `ring`, as `blocks` says.

    It stands in for an `ExpertCache`, of which the budget has none, and counts nothing.
    """

    looks_ahead = False

    def __init__(self, ring: BlockStream, blocks: Blocks) -> None:
        self._ring, self._blocks = ring, blocks
        self.counts: Counter[str] = Counter()

    @property
    def wait_s(self) -> float:
        """Seconds that compute has waited for reads."""
        return self._ring.wait_s

    def expect(self, layer: int, chosen: Array) -> None:
        """See `ExpertCache.expect`."""
        experts = np.unique(chosen).tolist()
        self._ring.expect(block for expert in experts for block in self._blocks(layer, expert))

    def take(self, layer: int, expert: int) -> Iterator[tuple[Sequence[Block], Tensor]]:
        """See `ExpertCache.take`; each is valid until the next."""
        for block in self._blocks(layer, expert):
            yield (block,), self._ring.take(block)
        self._ring.release()

    def prefetch(self, layer: int, experts: Iterable[int]) -> None:
        """Nothing: what is guessed wrong would have to be read to its end before what is right."""

    def abandon(self) -> None:
        """Forget what was expected."""
        self._ring.flush()


@dataclass(slots=True)
class _Slot:
    """Memory of one expert, of which the first `loaded` blocks are there, each at its place in `starts`."""

    memory: Tensor
    key: Key | None = None
    blocks: Sequence[Block] = ()
    starts: list[int] = field(default_factory=list)
    reads: list[Reading] = field(default_factory=list)
    loaded: int = 0

    @property
    def complete(self) -> bool:
        """Whether all blocks are there, as far as can be said without waiting."""
        while self.loaded < len(self.reads) and self.reads[self.loaded].ready:
            self.arrive()
        return self.loaded == len(self.blocks)

    def arrive(self) -> None:
        """Wait for the next block."""
        self.reads[self.loaded].wait()
        self.loaded += 1
        if self.loaded == len(self.blocks):
            self.reads = []

    def cancel(self) -> None:
        """Hold nothing. What `reads` holds may still write to the memory until `settle`."""
        self.loaded = 0  # first: whatever an interrupt leaves of the rest, nothing counts as there
        self.key, self.blocks = None, ()
        for read in self.reads:
            read.cancel()

    def settle(self) -> None:
        """Return when no read writes to the memory of a cancelled slot any more."""
        for read in self.reads:
            with contextlib.suppress(FlashrtError):
                read.wait()
        self.reads = []


class ExpertCache:
    """Experts in `memory`: slots of a `device`, uint8 [slot bytes] each, at least one.

    `blocks` gives what there is to read of an expert, `shape` is the number of layers and of experts in the largest.

    `counts` says how many experts that a router named were in memory (hits) or not yet all of them (misses), how many
    began to be read before a router named them (prefetched), and how many of those it then named (useful).
    """

    looks_ahead = True

    def __init__(
        self,
        device: Device,
        memory: Iterable[Tensor],
        blocks: Blocks,
        shape: tuple[int, int],
    ) -> None:
        self._slots = [_Slot(part) for part in memory]
        self._device, self._blocks = device, blocks
        self._ahead = max(-(-AHEAD_BYTES // len(self._slots[0].memory)), 1)  # experts
        self._forecast = Forecast(*shape)
        self._layer = 0  # the one that computes
        self._index = np.full(shape, -1)  # of the slot that holds an expert, whole or on its way
        self._empty = list(range(len(self._slots)))
        self._wanted: deque[Key] = deque()  # named by a router and not yet taken
        self._guesses: list[Key] = []
        self._begun: set[Key] = set()  # guesses that are being read, or were
        self._held: Key | None = None
        self.counts: Counter[str] = Counter()
        self.wait_s = 0.0

    def fill(self, keys: Iterable[Key], arrived: Progress) -> None:
        """Read experts, until the slots are full or `keys` exhausted."""
        flying: deque[_Slot] = deque()
        for key in keys:
            if not self._empty:
                break
            flying.append(self._start(key, self._empty.pop()))
            if len(flying) > self._ahead:
                self._finish(flying.popleft(), arrived)
        while flying:
            self._finish(flying.popleft(), arrived)

    def expect(self, layer: int, chosen: Array) -> None:
        """Start reading what the router of `layer` named, int [T, k]: to be taken in ascending order, each once."""
        self._forecast.update(layer, chosen)
        self._layer, self._held = layer, None
        self._wanted = deque((layer, expert) for expert in np.unique(chosen).tolist())
        self._count()
        self._drop_guesses()
        self._pump()

    def prefetch(self, layer: int, experts: Iterable[int]) -> None:
        """Read ahead what the router of `layer` will probably name, the most probable first."""
        self._guesses = [(layer, expert) for expert in experts]
        self._pump()

    def take(self, layer: int, expert: int) -> Iterator[tuple[Sequence[Block], Tensor]]:
        """Consecutive blocks of the next expert expected, as they arrive, with their bytes (uint8 [nbytes]).

        Those of one tensor each time. They are valid until another expert is taken or expected.
        """
        if not self._wanted or self._wanted[0] != (layer, expert):
            raise RuntimeError(f"expert {expert} of layer {layer} was taken out of turn")
        self._held = None
        self._pump()
        self._held = self._wanted.popleft()
        slot = self._slots[self._index[self._held]]
        first = 0
        while first < len(slot.blocks):
            self._wait_for(slot, first)
            self._pump()
            part = _of_one_tensor(slot.blocks[first : slot.loaded])
            start, nbytes = slot.starts[first], sum(block.nbytes for block in part)
            yield part, slot.memory[start : start + nbytes]
            first += len(part)

    def abandon(self) -> None:
        """Forget what was expected, after a pass that was left half-way; what is whole stays.

        Starts afresh from the slots themselves: an interrupt may have struck between any two steps.
        """
        self._wanted.clear()
        self._guesses, self._begun, self._held = [], set(), None
        self._index[:] = -1
        self._empty = []
        for index, slot in enumerate(self._slots):
            if slot.key is None or slot.reads or slot.loaded < len(slot.blocks):
                slot.cancel()
                self._empty.append(index)
            else:
                self._index[slot.key] = index
        self._device.settle()

    def check_integrity(self) -> None:
        """Raises AssertionError when slots, index and lists contradict each other."""
        for index, slot in enumerate(self._slots):
            assert (slot.key is None) == (index in self._empty), f"slot {index} is lost"
            assert slot.key is None or self._index[slot.key] == index, f"{slot.key} is not where the index says"
            assert slot.key is None or len(slot.reads) in (0, len(slot.blocks)), f"{slot.key} is read in part"
        assert len(set(self._empty)) == len(self._empty), "a slot is empty twice"
        assert np.count_nonzero(self._index >= 0) + len(self._empty) == len(self._slots), "the index is too long"

    def _count(self) -> None:
        hits = sum(key in self and self._slots[self._index[key]].complete for key in self._wanted)
        useful = len(self._begun.intersection(self._wanted))
        self.counts.update(hits=hits, misses=len(self._wanted) - hits, useful=useful)

    def __contains__(self, key: Key) -> bool:
        """Whether an expert is in a slot, whole or on its way."""
        return bool(self._index[key] >= 0)

    def _drop_guesses(self) -> None:
        """Cancel what was guessed wrong and is not there yet."""
        for key in self._begun.difference(self._wanted):
            if key in self and not self._slots[self._index[key]].complete:
                self._empty.append(self._evict(key))
        self._guesses, self._begun = [], set()

    def _pump(self) -> None:
        """Start reading what is waited for next, as far ahead as keeps the disk busy."""
        queue, ahead = list(dict.fromkeys([*self._wanted, *self._guesses])), 0  # a guess may be wanted already
        for place, key in enumerate(queue):
            if key not in self:
                guess = place >= len(self._wanted)
                index = self._room(queue[:place], queue[place + 1 :], guess)
                if index is None:
                    break
                self._start(key, index)
                if guess:
                    self._begun.add(key)
                    self.counts["prefetched"] += 1
            ahead += not self._slots[self._index[key]].complete
            if ahead == self._ahead:
                break

    def _room(self, sooner: Sequence[Key], later: Sequence[Key], guess: bool) -> int | None:
        """A slot for an expert needed between two others: an empty one, or that of the least valuable expert.

        Where all are waited for, the one waited for longest has to go, unless it is for a guess.
        """
        if self._empty:
            return self._empty.pop()
        values = np.where(self._index >= 0, self._forecast.values(self._layer), np.inf)
        for key in (*sooner, *later, *([self._held] if self._held else [])):
            values[key] = np.inf
        victim = np.unravel_index(values.argmin(), values.shape)
        if values[victim] < np.inf:
            return self._evict((int(victim[0]), int(victim[1])))
        last = next((key for key in reversed(later) if key in self and key != self._held), None)
        return None if last is None or guess else self._evict(last)

    def _evict(self, key: Key) -> int:
        index = int(self._index[key])
        self._slots[index].cancel()
        self._index[key] = -1
        return index

    def _start(self, key: Key, index: int) -> _Slot:
        slot = self._slots[index]
        slot.settle()
        self._index[key] = index
        slot.blocks = self._blocks(*key)  # before the key: a slot with a key and no blocks would count as whole
        slot.starts = _starts(slot.blocks)
        slot.key = key
        for block, start in zip(slot.blocks, slot.starts, strict=True):
            slot.reads.append(self._device.read(block, slot.memory[start : start + block.nbytes]))
        return slot

    def _wait_for(self, slot: _Slot, block: int) -> None:
        """Return when a block of a slot, and those before it, are there."""
        if slot.complete or slot.loaded > block:
            return
        began = time.perf_counter()
        while slot.loaded <= block:
            slot.arrive()
        self.wait_s += time.perf_counter() - began

    def _finish(self, slot: _Slot, arrived: Progress) -> None:
        for place, block in enumerate(slot.blocks):
            self._wait_for(slot, place)
            arrived(block.nbytes)


def _starts(blocks: Sequence[Block]) -> list[int]:
    """Where blocks lie in a slot: those of a tensor back to back, behind the beginning of a page as in their file."""
    starts, end, tensor = [], 0, ""
    for block in blocks:
        if block.tensor != tensor:
            end += (block.shift - end) % PAGE
        starts.append(end)
        end, tensor = end + block.nbytes, block.tensor
    return starts


def _of_one_tensor(blocks: Sequence[Block]) -> Sequence[Block]:
    """The first of them that are of the same tensor."""
    count = sum(1 for _ in itertools.takewhile(lambda block: block.tensor == blocks[0].tensor, blocks))
    return blocks[:count]
