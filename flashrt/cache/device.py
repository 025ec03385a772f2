"""What the engine needs of the place that computes: memory, kernels, and blocks brought to it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from flashrt.budget.ledger import Ledger, populate
from flashrt.cache.streamer import Reading, Streamer, Submit
from flashrt.storage.layout import Block
from flashrt.storage.reader import DEPTH, BlockTicket, Reader
from flashrt_kernels.ops import Ops

GROWING = ("KV", "KV cells", "KV buffers")  # owners of what is written token by token

Tensor = Any  # an array of the backend: numpy for 'cpu', torch for 'torch'
Progress = Callable[[int], None]  # bytes of a block that has arrived


class BlockStream(Protocol):
    """Blocks in the order in which they will be used; see `Streamer`."""

    wait_s: float

    def expect(self, blocks: Iterable[Block], submit: Submit | None = None) -> None: ...
    def take(self, block: Block) -> Tensor: ...
    def take_all(self, blocks: Sequence[Block]) -> list[Tensor]: ...
    def release(self) -> None: ...
    def flush(self) -> None: ...


class Device(Protocol):
    """A place that computes."""

    ops: Ops[Tensor]
    split_invariant: bool  # whether kernels give the same bits for adjacent blocks at once as one by one

    def allocate(self, owner: str, shape: Sequence[int], dtype: np.dtype | type) -> Tensor:
        """Zeroed memory of the device, charged to `owner`; uint16 stands for bfloat16."""

    def scratch(self, nbytes: int) -> Tensor:
        """Memory for the kernels' intermediate results, uint8 [nbytes]; None where they allocate for themselves."""

    def window(self, nbytes: int) -> np.ndarray:
        """Page-aligned host memory, uint8 [nbytes], through which single rows of embeddings are read."""

    def stream(self, slots: int, slot_bytes: int) -> BlockStream:
        """A ring of `slots` buffers."""

    def read(self, block: Block, memory: Tensor) -> Reading:
        """Start bringing a block to its uint8 memory of the device, which nothing computes with any more."""

    def settle(self) -> None:
        """Return when what was `read` is over, or cancelled: no memory is written to any more."""

    def fill(self, items: Iterable[tuple[Block, Tensor]], arrived: Progress) -> None:
        """Read each block into its uint8 memory of the device."""

    def cache_on_host(self, blocks: Iterable[Block]) -> None:
        """Bring those of the blocks to be streamed nearer that a tier between disk and device has room for."""

    def put(self, values: np.ndarray, out: Tensor) -> None:
        """Copy host values to memory of the device."""

    def make(self, values: np.ndarray) -> Tensor:
        """Host values on the device: small things that change with every pass, such as who goes to which expert."""

    def get(self, values: Tensor) -> np.ndarray:
        """Values of the device on the host; valid until the next pass."""


class CpuDevice:
    """The budgeted memory of a machine without a GPU: reads go straight to where the kernels compute."""

    split_invariant = True

    def __init__(self, ops: Ops[np.ndarray], ledger: Ledger, reader: Reader) -> None:
        self.ops, self._ledger, self._reader = ops, ledger, reader

    def allocate(self, owner: str, shape: Sequence[int], dtype: np.dtype | type) -> np.ndarray:
        array = self._ledger.allocate(owner, shape, dtype)
        if owner in GROWING:  # written token by token: without this the process would grow while decoding
            populate(array)
        return array

    def scratch(self, nbytes: int) -> np.ndarray:
        return self._ledger.allocate("activations", (nbytes,), np.uint8)

    def window(self, nbytes: int) -> np.ndarray:
        return self._ledger.allocate("embedding reads", (nbytes,), np.uint8)

    def stream(self, slots: int, slot_bytes: int) -> Streamer:
        return Streamer(self._reader, self._ledger.allocate("stream buffers", (slots, slot_bytes), np.uint8))

    def read(self, block: Block, memory: np.ndarray) -> BlockTicket:
        return self._reader.submit(block, memory)

    def settle(self) -> None:
        self._reader.settle()

    def fill(self, items: Iterable[tuple[Block, np.ndarray]], arrived: Progress) -> None:
        flying: deque = deque()

        def finish() -> None:
            ticket = flying.popleft()
            ticket.wait()
            arrived(ticket.block.nbytes)

        for block, memory in items:
            flying.append(self._reader.submit(block, memory, start=True))
            if len(flying) > DEPTH:
                finish()
        while flying:
            finish()

    def cache_on_host(self, blocks: Iterable[Block]) -> None:
        """There is no such tier: memory not in the plan belongs to others."""

    def put(self, values: np.ndarray, out: np.ndarray) -> None:
        out[...] = values

    def make(self, values: np.ndarray) -> np.ndarray:
        return values

    def get(self, values: np.ndarray) -> np.ndarray:
        return values
