"""A ring of buffers through which blocks stream in the order in which they will be used.

The user says what it will take, in order (`expect`), and takes it (`take`). Reads run ahead as far as there are free
buffers, across layers and passes. A block stays valid until the next `take`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np

from flashrt.storage.layout import Block
from flashrt.storage.reader import BlockTicket, Reader

Array = np.ndarray


class Streamer:
    """`slots` are page-aligned uint8 buffers, each at least as large as any block; at least two, or none at all."""

    def __init__(self, reader: Reader, slots: Iterable[Array]) -> None:
        self._reader = reader
        self._slots = tuple(slots)
        self._free = deque(self._slots)
        self._wanted: deque[Iterator[Block]] = deque()
        self._flying: deque[tuple[BlockTicket, Array]] = deque()
        self._held: Array | None = None
        self.wait_s = 0.0

    def expect(self, blocks: Iterable[Block]) -> None:
        """Announce what will be taken next, after all that is already expected.

        `blocks` is gone through as their turn comes.
        """
        if self._slots:  # without any, everything is resident and there is nothing to expect
            self._wanted.append(iter(blocks))
        self._pump()

    def take(self, block: Block) -> Array:
        """The bytes of `block` (uint8 [nbytes]), which must be the next one expected."""
        self.release()
        if not self._flying or self._flying[0][0].block != block:
            raise RuntimeError(f"block {block.index} of {block.tensor} was taken out of turn")
        ticket, slot = self._flying.popleft()
        self._held = slot
        if not ticket.ready:
            began = time.perf_counter()
            ticket.wait()
            self.wait_s += time.perf_counter() - began
        ticket.wait()
        return ticket.buffer

    def release(self) -> None:
        """Let go of the block taken last: its buffer may be read into again."""
        if self._held is not None:
            self._free.append(self._held)
            self._held = None
        self._pump()

    def flush(self) -> None:
        """Forget everything expected. Reads that have begun are waited for.

        Starts afresh from the slots themselves: an interrupt may have struck between any two steps.
        """
        self._wanted.clear()
        for ticket, _ in self._flying:
            ticket.cancel()
        self._reader.settle()
        self._flying.clear()
        self._held = None
        self._free = deque(self._slots)

    def _pump(self) -> None:
        while self._free and (block := next_block(self._wanted)) is not None:
            slot = self._free.popleft()
            self._flying.append((self._reader.submit(block, slot[: block.nbytes]), slot))


def next_block(wanted: deque[Iterator[Block]]) -> Block | None:
    """The next of a queue of sequences of blocks; None when all are exhausted."""
    while wanted:
        block = next(wanted[0], None)
        if block is not None:
            return block
        wanted.popleft()
    return None
