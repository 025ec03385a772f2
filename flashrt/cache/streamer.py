"""A ring of buffers through which blocks stream in the order in which they will be used.

The user says what it will take, in order (`expect`), and takes it (`take`). Reads run ahead as far as there are free
buffers, across layers and passes. What was taken stays valid until the next `take`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np

from flashrt.storage.layout import Block
from flashrt.storage.reader import BlockTicket, Reader

SUBMIT_BATCH = 4  # blocks at most that are submitted at once: what many of them need is found out only once

Array = np.ndarray
Place = tuple[Block, int]  # a block, and the buffer that is to hold it


class Reading(Protocol):
    """A block on its way to its memory; see `flashrt.storage.reader.Ticket`."""

    @property
    def ready(self) -> bool: ...
    def wait(self) -> None: ...
    def cancel(self) -> None: ...


Submit = Callable[[Reader, Sequence[Place], Array], Iterable[Reading]]


def whole_blocks(reader: Reader, places: Sequence[Place], memory: Array) -> list[BlockTicket]:
    """Start to read some blocks into rows of `memory`; a ticket for each."""
    return [reader.submit(block, memory[buffer, block.shift :][: block.nbytes]) for block, buffer in places]


class Streamer:
    """The rows of `memory` (uint8 [buffers, bytes], page-aligned) are buffers, each at least as large as any block.

    There are at least two, or none at all.
    """

    def __init__(self, reader: Reader, memory: Array) -> None:
        self._reader, self.memory = reader, memory
        self._free = deque(range(len(memory)))
        self._wanted: deque[tuple[Iterator[Block], Submit]] = deque()
        self._flying: deque[tuple[Place, Reading]] = deque()
        self._held: list[int] = []
        self.wait_s = 0.0

    def expect(self, blocks: Iterable[Block], submit: Submit | None = None) -> None:
        """Announce what will be taken next, after all that is already expected.

        `blocks` is gone through as their turn comes. `submit` starts their reads where not all of a block is wanted.
        """
        if len(self.memory):  # without any buffers, everything is resident and there is nothing to expect
            self._wanted.append((iter(blocks), submit or whole_blocks))
            self._pump()

    def take(self, block: Block) -> Array:
        """The bytes of `block` (uint8 [nbytes + tail]), which must be the next one expected."""
        return self.take_all([block])[0]

    def take_all(self, blocks: Sequence[Block]) -> list[Array]:
        """The bytes of the next blocks expected, no more than there are buffers."""
        self.release()
        taken, last = [], None
        for block in blocks:
            if not self._flying or self._flying[0][0][0] != block:
                raise RuntimeError(f"block {block.index} of {block.tensor} was taken out of turn")
            (_, buffer), ticket = self._flying.popleft()
            self._held.append(buffer)
            if ticket is not last:  # several blocks may have one
                self._await(ticket)
                last = ticket
            taken.append(self.memory[buffer, block.shift :][: block.nbytes + block.tail])
        return taken

    def release(self) -> None:
        """Let go of what was taken last: the buffers may be read into again."""
        self._free.extend(self._held)
        self._held = []
        self._pump()

    def flush(self) -> None:
        """Forget everything expected. Reads that have begun are waited for.

        Starts afresh from the buffers themselves: an interrupt may have struck between any two steps.
        """
        if not (self._wanted or self._flying) and len(self._free) == len(self.memory):
            return  # nothing was begun, and what others read need not be waited for
        self._wanted.clear()
        for _, ticket in self._flying:
            ticket.cancel()
        self._reader.settle()
        self._flying.clear()
        self._held = []
        self._free = deque(range(len(self.memory)))

    def _await(self, ticket: Reading) -> None:
        if ticket.ready:
            ticket.wait()
            return
        began = time.perf_counter()
        ticket.wait()
        self.wait_s += time.perf_counter() - began

    def _pump(self) -> None:
        while self._free and (batch := self._next_batch()) is not None:
            places, submit = batch
            self._flying.extend(zip(places, submit(self._reader, places, self.memory), strict=True))

    def _next_batch(self) -> tuple[list[Place], Submit] | None:
        """Blocks of one source that there are buffers for; None when nothing more is wanted."""
        while self._wanted:
            blocks, submit = self._wanted[0]
            places: list[Place] = []
            while self._free and len(places) < SUBMIT_BATCH and (block := next(blocks, None)) is not None:
                places.append((block, self._free.popleft()))
            if places:
                return places, submit
            self._wanted.popleft()
        return None
