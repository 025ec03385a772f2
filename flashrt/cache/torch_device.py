"""Blocks brought to a GPU: disk → pinned host slots → device slots, copies overlapped with compute on a side stream.

The host is a tier of its own: blocks that fit in its budget are read once into pinned memory and cross PCIe from
there; the rest comes from disk each time. On `torch.device('cpu')` the same code runs without streams, as the
reference that tests compare with.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from flashrt.budget.ledger import Ledger
from flashrt.budget.plan import Plan
from flashrt.cache.device import Progress
from flashrt.cache.streamer import Submit
from flashrt.errors import BudgetError, FlashrtError, UsageError
from flashrt.storage.layout import Block
from flashrt.storage.reader import BlockTicket, Reader
from flashrt_kernels.ops import Ops
from flashrt_kernels.rows import align

Slot = torch.Tensor

FILL_DEPTH = 10  # staging buffers, of a block each, while the model is loaded, and for what is read into place later
ARENA_ALIGNMENT = 512  # bytes; what torch's own allocator gives
_DTYPES = {np.uint8: torch.uint8, np.float32: torch.float32, np.uint16: torch.bfloat16}


class TorchDevice:
    """A torch device behind a ledger that counts its memory.

    `host_blocks` maps tensor → how many of its leading blocks host memory may hold (those on the device included).
    """

    split_invariant = False  # a matrix product sums in an order that depends on its shape

    def __init__(
        self,
        ops: Ops[torch.Tensor],
        name: str,
        ledger: Ledger,
        reader: Reader,
        arena_bytes: int,
        host_blocks: Mapping[str, int],
    ) -> None:
        """All memory is carved from one arena of `arena_bytes`: the allocator's rounding would break a tight budget."""
        self.ops, self._ledger, self._reader = ops, ledger, reader
        self.device = torch.device(name)
        self._cuda = self.device.type == "cuda"
        self._copies = torch.cuda.Stream(self.device) if self._cuda else None
        self._arena = torch.zeros(arena_bytes, dtype=torch.uint8, device=self.device)
        self._used = 0
        self._host_blocks = host_blocks
        self._host: dict[tuple[str, int], torch.Tensor] = {}
        self._reads: TorchReads | None = None  # made with the first read: it takes staging memory

    def allocate(self, owner: str, shape: Sequence[int], dtype: np.dtype | type) -> torch.Tensor:
        kind = _DTYPES[np.dtype(dtype).type]
        nbytes = math.prod(shape) * kind.itemsize
        self._ledger.charge(owner, nbytes)
        if self._used + nbytes > len(self._arena):
            raise BudgetError(f"internal accounting error: {owner} asks for {nbytes} bytes, the arena is full")
        region = self._arena[self._used : self._used + nbytes]
        self._used += align(nbytes, ARENA_ALIGNMENT)
        return region.view(kind).reshape(tuple(shape))

    def scratch(self, nbytes: int) -> None:
        """Torch takes its own from what the arena leaves; here it is only counted."""
        self._ledger.charge("activations", nbytes)

    def window(self, nbytes: int) -> np.ndarray:
        return self._staging(nbytes).numpy()

    def stream(self, slots: int, slot_bytes: int) -> TorchStream:
        device_slots = [self.allocate("stream buffers", (slot_bytes,), np.uint8) for _ in range(slots)]
        staging = [self._staging(slot_bytes) for _ in range(slots)]
        return TorchStream(self._reader, device_slots, staging, self._host, self._copies)

    def read(self, block: Block, memory: torch.Tensor) -> TorchReading:
        if self._reads is None:
            self._reads = TorchReads(self._reader, self._staging_buffers(), self._host, self._copies)
        return self._reads.submit(block, memory)

    def settle(self) -> None:
        if self._reads is not None:
            self._reads.settle()

    def fill(self, items: Iterable[tuple[Block, torch.Tensor]], arrived: Progress) -> None:
        flying: deque[tuple[BlockTicket, torch.Tensor, torch.Tensor]] = deque()
        free = deque(self._staging_buffers())

        def finish() -> None:
            ticket, staged, memory = flying.popleft()
            ticket.wait()
            memory.copy_(staged[: ticket.block.nbytes])
            free.append(staged)
            arrived(ticket.block.nbytes)

        for block, memory in items:
            if not free:
                finish()
            staged = free.popleft()
            ticket = self._reader.submit(block, staged[: block.nbytes].numpy(), start=True)
            flying.append((ticket, staged, memory))
        while flying:
            finish()

    def put(self, values: np.ndarray, out: torch.Tensor) -> None:
        out.copy_(torch.from_numpy(np.array(values)))

    def make(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self.device)

    def get(self, values: torch.Tensor) -> np.ndarray:
        return values.detach().to("cpu", torch.float32).numpy()

    def cache_on_host(self, blocks: Iterable[Block]) -> None:
        flying: list[BlockTicket] = []
        for block in blocks:
            if block.index < self._host_blocks.get(block.tensor, 0):
                memory = self._staging(block.nbytes)
                self._host[block.tensor, block.index] = memory
                flying.append(self._reader.submit(block, memory.numpy()))
        for ticket in flying:
            ticket.wait()

    def _staging_buffers(self) -> list[torch.Tensor]:
        largest = max(t.max_block_bytes for t in self._reader.pack.layout.tensors.values())
        return [self._staging(largest) for _ in range(FILL_DEPTH)]

    def _staging(self, nbytes: int) -> torch.Tensor:
        """Page-aligned host memory, pinned where a GPU reads from it."""
        page = 4096
        raw = torch.empty(nbytes + page, dtype=torch.uint8, pin_memory=self._cuda)
        offset = -raw.data_ptr() % page
        return raw[offset : offset + nbytes]


def arena_bytes(plan: Plan, scratch: int) -> int:
    """Device memory that a plan grants to weights and buffers, what torch allocates for itself left out."""
    elsewhere = ("process", "slack", "embedding reads")
    grants = sum(nbytes for owner, nbytes in plan.owners.items() if owner not in elsewhere)
    allocations = 4 * (len(plan.pinned) + 64) + 2 * plan.ring_slots  # a generous count, for their alignment
    return grants - scratch + allocations * ARENA_ALIGNMENT


@dataclass(slots=True)
class _Flight:
    """A block on its way: read (unless host memory holds it), then copied."""

    block: Block
    source: torch.Tensor
    staging: torch.Tensor | None
    ticket: BlockTicket | None
    slot: Slot | None = None
    copied: Any = None  # CUDA event


class TorchStream:
    """A ring like `Streamer`, whose buffers lie on a torch device. `host` holds blocks that need no read."""

    def __init__(
        self,
        reader: Reader,
        slots: Sequence[Slot],
        staging: Sequence[torch.Tensor],
        host: Mapping[tuple[str, int], torch.Tensor],
        copies: Any,
    ) -> None:
        self._reader, self._host, self._copies = reader, host, copies
        self._all = tuple(slots), tuple(staging)
        self.wait_s = 0.0
        self._start_afresh()

    def _start_afresh(self) -> None:
        slots, staging = self._all
        self._free: deque[tuple[Slot, Any]] = deque((slot, None) for slot in slots)  # slot, event of its last use
        self._staging = deque(staging)
        self._leaving: deque[tuple[torch.Tensor, Any]] = deque()  # staging buffers being copied from, with the event
        self._wanted: deque[Iterator[Block]] = deque()
        self._ahead: Block | None = None  # the next block, which found no staging buffer yet
        self._flying: deque[_Flight] = deque()
        self._held: list[Slot] = []

    def expect(self, blocks: Iterable[Block], submit: Submit | None = None) -> None:
        if submit is not None:
            raise ValueError("blocks are copied whole to a torch device: its plans have no adaptive FFNs")
        if self._all[0]:
            self._wanted.append(iter(blocks))
        self._pump()

    def take(self, block: Block) -> torch.Tensor:
        return self.take_all([block])[0]

    def take_all(self, blocks: Sequence[Block]) -> list[torch.Tensor]:
        self.release()
        taken = []
        for block in blocks:
            if not self._flying or self._flying[0].block != block:
                raise RuntimeError(f"block {block.index} of {block.tensor} was taken out of turn")
            flight = self._flying[0]
            if flight.copied is None:
                self._copy(flight)
            self._flying.popleft()
            if self._copies is not None:
                torch.cuda.current_stream().wait_event(flight.copied)
            assert flight.slot is not None
            self._held.append(flight.slot)
            taken.append(flight.slot[: block.nbytes])
        self._pump()
        return taken

    def release(self) -> None:
        if self._held:
            used = self._used()
            self._free.extend((slot, used) for slot in self._held)
            self._held = []
        self._pump()

    def flush(self) -> None:
        for flight in self._flying:
            if flight.ticket is not None:
                flight.ticket.cancel()
        self._reader.settle()
        if self._copies is not None:
            torch.cuda.synchronize()
        self._start_afresh()

    def _pump(self) -> None:
        """Start reads while there are staging buffers, and copies of what has arrived while there are slots."""
        while self._leaving and (self._leaving[0][1] is None or self._leaving[0][1].query()):
            self._staging.append(self._leaving.popleft()[0])
        while len(self._flying) < len(self._free) + len(self._staging) + 1:
            self._ahead = self._ahead or self._next_block()
            flight = None if self._ahead is None else self._depart(self._ahead)
            if flight is None:
                break
            self._ahead = None
            self._flying.append(flight)
        for flight in self._flying:
            if flight.copied is None:
                if not self._free or (flight.ticket is not None and not flight.ticket.ready):
                    break
                self._copy(flight)

    def _next_block(self) -> Block | None:
        while self._wanted:
            block = next(self._wanted[0], None)
            if block is not None:
                return block
            self._wanted.popleft()
        return None

    def _depart(self, block: Block) -> _Flight | None:
        held = self._host.get((block.tensor, block.index))
        if held is not None:
            return _Flight(block, held, None, None)
        if not self._staging:
            return None
        staging = self._staging.popleft()
        source = staging[: block.nbytes]
        return _Flight(block, source, staging, self._reader.submit(block, source.numpy()))

    def _copy(self, flight: _Flight) -> None:
        """Enqueue the copy to a device slot; waits for the read, not for the copy."""
        if flight.ticket is not None:
            began = time.perf_counter()
            flight.ticket.wait()
            self.wait_s += time.perf_counter() - began
        slot, used = self._free.popleft()
        with torch.cuda.stream(self._copies) if self._copies is not None else contextlib.nullcontext():
            if used is not None:
                self._copies.wait_event(used)
            slot[: flight.block.nbytes].copy_(flight.source, non_blocking=True)
            flight.slot, flight.copied = slot, self._copies.record_event() if self._copies is not None else True
        if flight.staging is not None:
            self._leaving.append((flight.staging, flight.copied if self._copies is not None else None))

    def _used(self) -> Any:
        """An event after all that is enqueued so far on the computing stream."""
        return torch.cuda.current_stream().record_event() if self._copies is not None else None


class TorchReading:
    """A block on its way to memory of the device; see `Ticket`. Over when its copy is enqueued, or when it has failed.

    `used` is an event after the last computation with that memory.
    """

    def __init__(self, reads: TorchReads, block: Block, memory: torch.Tensor, used: Any) -> None:
        self._reads = reads
        self.block, self.memory, self.used = block, memory, used
        self.ticket: BlockTicket | None = None
        self.copied: Any = None  # CUDA event
        self.error: FlashrtError | None = None

    @property
    def over(self) -> bool:
        return self.copied is not None or self.error is not None

    @property
    def ready(self) -> bool:
        self._reads.pump()
        return self.over

    def wait(self) -> None:
        while not self.over:
            self._reads.finish_first()
        if self.error is not None:
            raise self.error
        self._reads.order_after(self.copied)

    def cancel(self) -> None:
        if self.ticket is not None:
            self.ticket.cancel()
        if not self.over:
            self.error = UsageError(f"reading block {self.block.index} of {self.block.tensor} was cancelled")

    @property
    def staged(self) -> bool:
        """Whether its staging buffer is still in use."""
        if self.ticket is None:
            return False
        copying = self.copied is not None and self._reads.copies is not None and not self.copied.query()
        return not self.over or not self.ticket.ready or copying


class TorchReads:
    """Reads into memory of a torch device, in order, through staging buffers. `host` holds blocks that need no read."""

    def __init__(
        self,
        reader: Reader,
        staging: Sequence[torch.Tensor],
        host: Mapping[tuple[str, int], torch.Tensor],
        copies: Any,
    ) -> None:
        self.copies = copies
        self._reader, self._staging, self._host = reader, staging, host
        self._start_afresh()

    def _start_afresh(self) -> None:
        self._users: list[TorchReading | None] = [None] * len(self._staging)
        self._queue: deque[TorchReading] = deque()

    def submit(self, block: Block, memory: torch.Tensor) -> TorchReading:
        used = torch.cuda.current_stream().record_event() if self.copies is not None else None
        reading = TorchReading(self, block, memory, used)
        self._queue.append(reading)
        self.pump()
        return reading

    def pump(self) -> None:
        """Start reads while there are staging buffers, and copies of what has arrived."""
        for reading in self._queue:
            if reading.ticket is None and not reading.over and not self._begin(reading):
                break
        while self._queue and self._arrived(self._queue[0]):
            self.finish_first()

    def finish_first(self) -> None:
        """Wait for the first read and enqueue its copy."""
        reading = self._queue[0]
        if reading.ticket is None and not reading.over and not self._begin(reading):
            self._reader.settle()  # all staging buffers are taken, by copies or by reads that were cancelled
            if self.copies is not None:
                self.copies.synchronize()
            self._begin(reading)
        if not reading.over:
            assert reading.ticket is not None
            try:
                reading.ticket.wait()
                self._copy(reading, reading.ticket.buffer)
            except FlashrtError as error:
                reading.error = error
        self._queue.popleft()

    def settle(self) -> None:
        """Cancel all reads, and return when no memory is written to any more."""
        for reading in self._queue:
            reading.cancel()
        self._reader.settle()
        if self.copies is not None:
            torch.cuda.synchronize()
        self._start_afresh()

    def order_after(self, copied: Any) -> None:
        """Have what is computed from now on wait for a copy."""
        if self.copies is not None:
            torch.cuda.current_stream().wait_event(copied)

    def _arrived(self, reading: TorchReading) -> bool:
        return reading.over or (reading.ticket is not None and reading.ticket.ready)

    def _begin(self, reading: TorchReading) -> bool:
        """Start a read, or the copy of what the host holds; False when there is no staging buffer."""
        block = reading.block
        held = self._host.get((block.tensor, block.index))
        if held is not None:
            self._copy(reading, held)
            return True
        index = next((i for i, user in enumerate(self._users) if user is None or not user.staged), None)
        if index is None:
            return False
        self._users[index] = reading
        reading.ticket = self._reader.submit(block, self._staging[index][: block.nbytes].numpy())
        return True

    def _copy(self, reading: TorchReading, source: Any) -> None:
        with torch.cuda.stream(self.copies) if self.copies is not None else contextlib.nullcontext():
            if reading.used is not None:
                self.copies.wait_event(reading.used)
            reading.memory.copy_(torch.as_tensor(source), non_blocking=True)
            reading.copied = self.copies.record_event() if self.copies is not None else True
