"""Reads blocks of a pack into caller-owned buffers, several at a time, around the page cache.

Worker threads issue `preadv` on O_DIRECT descriptors; Python is off the data path and the GIL is released while the
kernel copies. Every block is checked against its CRC-32 the first time that it is read in this process.
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import threading
import zlib
from pathlib import Path

import numpy as np

from flashrt.errors import DiskError, PackError, UsageError
from flashrt.storage.layout import PAGE, Block
from flashrt.storage.pack import Pack

DEPTH = 8  # reads of about 1 MiB in flight: 9% more than 4 here, and no more from 16

Array = np.ndarray


class Ticket:
    """A read under way."""

    __slots__ = ("_done", "block", "buffer", "error")

    def __init__(self, block: Block, buffer: Array) -> None:
        self.block, self.buffer = block, buffer
        self.error: Exception | None = None
        self._done = threading.Event()

    @property
    def ready(self) -> bool:
        return self._done.is_set()

    def finish(self, error: Exception | None = None) -> None:
        self.error = error
        self._done.set()

    def wait(self) -> None:
        """Return when the data is there. Raises what the read raised."""
        self._done.wait()
        if self.error is not None:
            raise self.error


class Reader:
    """Block reads of one pack. `direct` says whether reads go around the page cache."""

    def __init__(self, pack: Pack, depth: int = DEPTH) -> None:
        self.pack = pack
        self.bytes_read = 0
        self.direct = True
        self._files: dict[str, int] = {}
        self._verified = {name: bytearray(tensor.blocks) for name, tensor in pack.layout.tensors.items()}
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[Ticket | threading.Barrier | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        try:
            for name in pack.layout.file_bytes:
                self._files[name] = self._open(pack.path / name)
        except DiskError:
            self.close()
            raise
        self._threads = [threading.Thread(target=self._work, name=f"read-{i}", daemon=True) for i in range(depth)]
        for thread in self._threads:
            thread.start()

    def _open(self, path: Path) -> int:
        try:
            try:
                return os.open(path, os.O_RDONLY | os.O_DIRECT)
            except OSError as error:
                if error.errno != errno.EINVAL:  # what a file system without O_DIRECT answers
                    raise
                self.direct = False
                return os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DiskError(f"{path} cannot be opened: {error.strerror}") from None

    def submit(self, block: Block, buffer: Array) -> Ticket:
        """Start reading `block` into `buffer` (uint8 [block.nbytes], page-aligned). Raises UsageError once closed."""
        self._check_open()
        ticket = Ticket(block, buffer)
        self._queue.put(ticket)
        return ticket

    def settle(self) -> None:
        """Return when every read submitted so far is over."""
        barrier = threading.Barrier(len(self._threads) + 1)
        try:
            for _ in self._threads:  # the queue is in order: each worker meets the others only after all reads before
                self._queue.put(barrier)
            barrier.wait()
        except BaseException:  # an interrupt: let the workers that wait go on
            barrier.abort()
            raise

    def read_rows(self, file: str, offset: int, nbytes: int, window: Array) -> Array:
        """Read bytes [offset, offset + nbytes) through `window` (uint8, page-aligned, two pages longer than nbytes)."""
        self._check_open()
        start = offset // PAGE * PAGE
        size = -(-(offset + nbytes - start) // PAGE) * PAGE
        self._read(file, start, window[:size], nbytes + offset - start)
        return window[offset - start : offset - start + nbytes]

    def close(self) -> None:
        """Stop the workers and close the files. Reads under way are finished first."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []
        for handle in self._files.values():
            os.close(handle)
        self._files = {}

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            if isinstance(item, threading.Barrier):
                with contextlib.suppress(threading.BrokenBarrierError):
                    item.wait()
                continue
            try:
                self._read(item.block.file, item.block.offset, item.buffer, item.block.nbytes)
                self._verify(item.block, item.buffer)
            except Exception as error:  # handed to whoever waits for the block
                item.finish(error)
            else:
                item.finish()

    def _read(self, file: str, offset: int, buffer: Array, needed: int) -> None:
        """Fill `buffer` from `offset`, at least the first `needed` bytes: the end of the file may cut the rest."""
        handle, view = self._files[file], buffer.data
        done = 0
        try:
            while done < needed:
                reached = done + os.preadv(handle, [view[done:]], offset + done)
                if reached < needed:
                    reached -= reached % PAGE  # O_DIRECT goes on from a page boundary only
                if reached == done:
                    raise PackError(
                        f"{self.pack.path / file} ends before byte {offset + needed}: it was cut short while in use"
                    )
                done = reached
        except OSError as error:
            raise DiskError(
                f"reading {self.pack.path / file} at byte {offset + done} failed: {error.strerror}"
            ) from None
        finally:
            with self._lock:
                self.bytes_read += done
        if not self.direct:
            os.posix_fadvise(handle, offset, len(buffer), os.POSIX_FADV_DONTNEED)

    def verified(self, block: Block) -> bool:
        """Whether `block` has been read whole, and compared with its checksum, in this process."""
        return bool(self._verified[block.tensor][block.index])

    def _verify(self, block: Block, buffer: Array) -> None:
        if self.verified(block):
            return
        if zlib.crc32(buffer.data) != self.pack.block_crc(block.tensor, block.index):
            raise PackError(
                f"{self.pack.path / block.file} is damaged: block {block.index} of {block.tensor} does not match its "
                "checksum. Pack the checkpoint again"
            )
        self._verified[block.tensor][block.index] = 1

    def _check_open(self) -> None:
        if not self._threads:
            raise UsageError("the engine is closed: load the model again")
