"""The rates that the I/O engine reaches on a file, by the size of reads and their number in flight."""

from __future__ import annotations

import itertools
import mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np

from flashrt.errors import DiskError
from flashrt.storage import _io
from flashrt.storage.direct import open_direct
from flashrt.storage.layout import PAGE

MEMORY_BYTES = 8 << 20  # into which all reads go, over and over
LEAST_STAGING = 64 << 10
BATCH_BYTES = 2 << 20  # that one call asks for at least: calls are to cost nothing beside reads
CURVE_BLOCKS = (4 << 10, 16 << 10, 64 << 10, 256 << 10)
CURVE_S = 0.025  # seconds per block size and round
CURVE_ROUNDS = 2


class Meter:
    """Reads `path` with engines of its own. `direct` is False where the page cache may flatter the figures.

    `backend` is the name of what carries out the reads; give one to force it. `limit` is how much of the file is read.
    """

    def __init__(
        self, path: Path, backend: str = "", memory_bytes: int = MEMORY_BYTES, limit: int | None = None
    ) -> None:
        self._path = path
        self._memory = np.frombuffer(mmap.mmap(-1, memory_bytes), np.uint8)
        self.backend = self._engine(backend, 1, PAGE).backend
        self._handle, self.direct = open_direct(path)
        size = os.fstat(self._handle).st_size
        self._nbytes = size if limit is None else min(size, limit)

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._handle)

    def rate(self, block: int, depth: int, seconds: float, in_order: bool = False) -> float:
        """Bytes per second of reads of `block` bytes (whole pages, at most all of the memory), `depth` in flight.

        At random places or in order, for about `seconds`; 0 for a file smaller than a block. Raises DiskError.
        """
        places = self._nbytes // block
        if places == 0:
            return 0.0
        out = self._memory[: len(self._memory) // block * block].reshape(-1, block)
        batch = max(depth, BATCH_BYTES // block)
        slots = np.arange(batch) % len(out)
        engine = self._engine(self.backend, depth, block)
        try:
            began = time.perf_counter()
            flying: list[_io.Read] = []
            for offsets in _batches(places, batch, in_order):
                flying.append(engine.read_rows(self._handle, self.direct, offsets * block, out, slots))
                if len(flying) > 1:  # one batch waits while another is read: the disk never does
                    self._finish(flying.pop(0))
                if time.perf_counter() - began > seconds:
                    break
            for read in flying:
                self._finish(read)
            return engine.bytes_read / (time.perf_counter() - began)
        finally:
            engine.close()

    def curve(self, depth: int) -> dict[int, float]:
        """Bytes per second of random reads of a few sizes, the better of two tries each: 0.2 s in all."""
        tries: dict[int, list[float]] = {block: [] for block in CURVE_BLOCKS}
        for block in itertools.chain(*[CURVE_BLOCKS] * CURVE_ROUNDS):
            tries[block].append(self.rate(block, depth, CURVE_S))
        return {block: max(rates) for block, rates in tries.items() if max(rates) > 0}

    def _engine(self, backend: str, depth: int, block: int) -> _io.Engine:
        return _io.Engine(backend, depth, block, self._memory[:LEAST_STAGING])  # all reads here are aligned

    def _finish(self, read: _io.Read) -> None:
        status = read.wait()
        if status != 0:
            reason = os.strerror(status) if status > 0 else "the file was cut short"
            raise DiskError(f"reading {self._path} at byte {read.at} failed: {reason}")


def _batches(places: int, count: int, in_order: bool) -> Iterator[np.ndarray]:
    """Endlessly, `count` block numbers below `places`. The random ones are the same each time.

    Some disks, those of virtual machines above all, are slow when a place is read for the first time.
    """
    choice, start = np.random.default_rng(0), 0
    while True:
        if in_order:
            yield (start + np.arange(count)) % places
            start += count
        else:
            yield choice.integers(0, places, count)
