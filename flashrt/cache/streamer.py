"""A ring of buffers through which blocks stream in the order in which they will be used.

The user says what it will take, in order (`expect`), and takes it (`take`). Reads run ahead as far as there are free
buffers, across layers and passes. What was taken stays valid until the next `take`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from flashrt.storage.layout import Block
from flashrt.storage.reader import Reader, Ticket

Array = np.ndarray
Submit = Callable[[Block, Array], Ticket]  # starts to read a block into a buffer of its size


class Streamer:
    """`slots` are page-aligned uint8 buffers, each at least as large as any block; at least two, or none at all.

    `submit` starts a read; another may be put in its place, which reads a part of a block only.
    """

    def __init__(self, reader: Reader, slots: Iterable[Array]) -> None:
        self._reader = reader
        self.submit: Submit = reader.submit
        self._slots = tuple(slots)
        self._free = deque(self._slots)
        self._wanted: deque[Iterator[Block]] = deque()
        self._flying: deque[tuple[Block, Ticket, Array]] = deque()
        self._held: list[Array] = []
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
        return self.take_all([block])[0]

    def take_all(self, blocks: Sequence[Block]) -> list[Array]:
        """The bytes of the next blocks expected, no more than there are buffers."""
        self.release()
        return [self._take(block) for block in blocks]

    def release(self) -> None:
        """Let go of what was taken last: the buffers may be read into again."""
        self._free.extend(self._held)
        self._held = []
        self._pump()

    def flush(self) -> None:
        """Forget everything expected. Reads that have begun are waited for.

        Starts afresh from the slots themselves: an interrupt may have struck between any two steps.
        """
        self._wanted.clear()
        for _, ticket, _ in self._flying:
            ticket.cancel()
        self._reader.settle()
        self._flying.clear()
        self._held = []
        self._free = deque(self._slots)

    def _take(self, block: Block) -> Array:
        if not self._flying or self._flying[0][0] != block:
            raise RuntimeError(f"block {block.index} of {block.tensor} was taken out of turn")
        _, ticket, slot = self._flying.popleft()
        self._held.append(slot)
        if not ticket.ready:
            began = time.perf_counter()
            ticket.wait()
            self.wait_s += time.perf_counter() - began
        ticket.wait()
        return slot[: block.nbytes]

    def _pump(self) -> None:
        while self._free and (block := next_block(self._wanted)) is not None:
            slot = self._free.popleft()
            self._flying.append((block, self.submit(block, slot[: block.nbytes]), slot))


def next_block(wanted: deque[Iterator[Block]]) -> Block | None:
    """The next of a queue of sequences of blocks; None when all are exhausted."""
    while wanted:
        block = next(wanted[0], None)
        if block is not None:
            return block
        wanted.popleft()
    return None
