"""Reads blocks and rows of a pack into caller-owned memory, many at a time, around the page cache.

The native engine does the reading: a call here starts any number of reads, a ticket says when they are over. Every
block is checked against its CRC-32 the first time that it is read in this process. Only what is read at start-up looks
into the page cache; a few threads do that, as copying and checking take more than one core.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from flashrt.errors import DiskError, PackError, UsageError
from flashrt.storage import _io
from flashrt.storage.cost import CostCurve
from flashrt.storage.direct import open_cached, open_direct
from flashrt.storage.kept_rows import check_rows
from flashrt.storage.layout import Block
from flashrt.storage.pack import Pack
from flashrt.storage.places import source_file
from flashrt_kernels.rows import row_bytes

DEPTH = 32  # reads in flight: what small ones need; with large ones, 5% more than 8 here
CHUNK_BYTES = 256 << 10  # of a block per read: larger ones are no faster, and rows would wait longer behind them
START_THREADS = 8
START_STAGING = 64 << 10  # bytes: the least that an engine takes, as blocks need none
STAGING_BYTES = 2 << 20  # rows arrive 15% faster than with half of it, and no faster with twice

Array = np.ndarray
Check = Callable[[Array | None], None]  # of rows that have not been looked at, None: of the file alone


class Ticket:
    """Reads under way. Dropped, they are cancelled, and their memory is let go of when the system has done with it."""

    __slots__ = ("_path", "_read")

    def __init__(self, path: Path, read: _io.Read) -> None:
        self._path, self._read = path, read

    @property
    def ready(self) -> bool:
        """Whether `wait` would return, or raise, at once."""
        return self._read.ready

    @property
    def bytes_read(self) -> int:
        """Bytes that came from the file so far: more than asked for, where rows were read together."""
        return self._read.bytes_read

    def wait(self) -> None:
        """Return when the data is there. Raises DiskError, PackError, or UsageError when it was cancelled."""
        status = self._read.wait()
        if status != 0:
            raise self._failure(status)

    def cancel(self) -> None:
        """Drop what the system has not begun to read."""
        self._read.cancel()

    def _failure(self, status: int) -> Exception:
        at = self._read.at
        if status == _io.CANCELLED:
            return UsageError(f"reading {self._path} was cancelled")
        if status == _io.ENDED:
            return PackError(f"{self._path} ends before byte {at}: it was cut short while in use")
        return DiskError(f"reading {self._path} at byte {at} failed: {os.strerror(status)}")


class BlockTicket(Ticket):
    """A block on its way into `buffer`. `verified` holds a flag for each block of its tensor."""

    __slots__ = ("_verified", "block", "buffer")

    def __init__(self, path: Path, read: _io.Read, block: Block, buffer: Array, verified: bytearray) -> None:
        super().__init__(path, read)
        self.block, self.buffer, self._verified = block, buffer, verified

    def wait(self) -> None:
        super().wait()
        self._verified[self.block.index] = 1

    def _failure(self, status: int) -> Exception:
        if status != _io.DAMAGED:
            return super()._failure(status)
        return PackError(
            f"{self._path} is damaged: block {self.block.index} of {self.block.tensor} does not match its checksum. "
            "Pack the checkpoint again"
        )


class RowTicket(BlockTicket):
    """A block of rows of one of the model's files, which has no checksums."""

    __slots__ = ("_check",)

    def __init__(self, path: Path, read: _io.Read, block: Block, buffer: Array, verified: bytearray, check: Check):
        super().__init__(path, read, block, buffer, verified)
        self._check = check

    def wait(self) -> None:
        """Also raises PackError where the file has changed, and CheckpointError for weights that are not finite."""
        Ticket.wait(self)
        self._check(None if self._verified[self.block.index] else self.buffer)
        self._verified[self.block.index] = 1


class Reader:
    """Reads of one pack, and of the files that an outline is of.

    `direct` says whether they go around the page cache, `backend` what carries them out.

    `staging` (uint8 [STAGING_BYTES], page-aligned) is memory for rows on their way, which nobody uses after `settle`.
    `curve` gives the costs by which rows are merged (without it, each is read by itself). `backend` may be named to
    force it.
    """

    def __init__(
        self,
        pack: Pack,
        staging: Array | None = None,
        curve: CostCurve | None = None,
        backend: str = "",
    ) -> None:
        self.pack = pack
        self._paths = {name: pack.path / name for name in pack.layout.file_bytes}
        self._sources = {source_file(number): source for number, source in enumerate(pack.sources)}
        self._paths |= {name: Path(source.path) for name, source in self._sources.items()}
        self._files: dict[str, tuple[int, bool]] = {}
        self._buffered: dict[str, tuple[int, bool]] = {}  # the same files, open through the page cache
        self._starter: _io.Engine | None = None  # reads what is read at start-up
        self._verified = {name: bytearray(tensor.blocks) for name, tensor in pack.layout.tensors.items()}
        if staging is None:
            staging = np.frombuffer(mmap.mmap(-1, STAGING_BYTES), np.uint8)
        self.staging = staging
        try:
            for name, path in self._paths.items():
                source = self._sources.get(name)
                self._files[name] = open_direct(path) if source is None else source.open()
            self._engine = _io.Engine(backend, DEPTH, CHUNK_BYTES, staging)
        except (DiskError, PackError):
            self._close_files()
            raise
        except RuntimeError as error:
            self._close_files()
            raise DiskError(f"nothing can be read: {error}") from None
        if curve is not None:
            self._engine.set_costs(curve.table(self._engine.max_span_pages))
        self.direct = all(direct for _, direct in self._files.values())

    @property
    def backend(self) -> str:
        """'io_uring' or 'pread'."""
        return self._engine.backend

    @property
    def bytes_read(self) -> int:
        return self._engine.bytes_read + (self._starter.bytes_read if self._starter else 0)

    def submit(self, block: Block, buffer: Array, start: bool = False) -> BlockTicket:
        """Start reading `block` into `buffer` (uint8 [block.nbytes]), `block.shift` behind the beginning of a page.

        Raises UsageError once closed. start: this is a read of start-up, see above.
        """
        handle, direct = self._open_file(block.file)
        if block.file in self._sources:
            read = self._engine.read(handle, direct, block.offset, buffer, None, -1)
            check = partial(self.check_rows, block.tensor)
            return RowTicket(self._paths[block.file], read, block, buffer, self._verified[block.tensor], check)
        crc = None if self.verified(block) else self.pack.block_crc(block.tensor, block.index)
        engine, cached = (self._start_engine(), self._buffered_file(block.file)) if start else (self._engine, -1)
        read = engine.read(handle, direct, block.offset, buffer, crc, cached)
        return BlockTicket(self._paths[block.file], read, block, buffer, self._verified[block.tensor])

    def submit_rows(self, file: str, offsets: Array, out: Array, slots: Array) -> Ticket:
        """Start reading the rows of `file` at `offsets` (int64 [n], bytes, in any order) into out[slots[i]].

        `out` is uint8 [slots, row bytes], `slots` int64 [n]. Neighbours are read together where the disk's costs say
        that it pays, gaps included. Rows overtake blocks. Nothing is compared with a checksum. Raises UsageError once
        closed.
        """
        handle, direct = self._open_file(file)
        return Ticket(self._paths[file], self._engine.read_rows(handle, direct, offsets, out, slots))

    def read_file(self, handle: int, direct: bool, offset: int, buffer: Array, crc: int | None = None) -> _io.Read:
        """Start reading from another open file (see `open_direct`), on boundaries of 4 KiB, into page-aligned memory.

        crc: what the bytes are compared with. Raises UsageError once closed.
        """
        self._check_open()
        return self._engine.read(handle, direct, offset, buffer, crc)

    def read_at_start(self, handle: int, direct: bool, offset: int, buffer: Array, cached: int) -> _io.Read:
        """Start a read of start-up from another open file, from a boundary of 4 KiB on, into page-aligned memory.

        cached: a descriptor of it through the page cache (see `open_cached`), or -1. Raises UsageError once closed.
        """
        self._check_open()
        return self._start_engine().read(handle, direct, offset, buffer, None, cached)

    def read_file_rows(self, handle: int, direct: bool, offsets: Array, out: Array, slots: Array) -> _io.Read:
        """Start reading rows of another open file, as `submit_rows` does. Raises UsageError once closed."""
        self._check_open()
        return self._engine.read_rows(handle, direct, offsets, out, slots)

    def check_rows(self, tensor: str, rows: Array | None = None) -> None:
        """Compare the file that has a tensor with what it was, then look whether some `rows` of it are finite.

        rows: uint8, whole ones, of any shape. Raises PackError and CheckpointError.
        """
        layout = self.pack.layout.tensors[tensor]
        self._sources[layout.file].check(self._files[layout.file][0])
        if rows is not None:
            size = row_bytes(layout.codec, layout.columns)
            values = rows.reshape(-1, size)
            check_rows(tensor, layout.codec, values, values.shape)

    def settle(self) -> None:
        """Return when every read submitted so far is over."""
        for engine in self._engines():
            engine.settle()

    def close(self) -> None:
        """Finish what the system has begun, cancel the other reads, and close the files."""
        for engine in self._engines():
            engine.close()
        self._close_files()

    def verified(self, block: Block) -> bool:
        """Whether `block` has been read whole, and compared with its checksum, in this process."""
        return bool(self._verified[block.tensor][block.index])

    def _close_files(self) -> None:
        for handle, _ in (*self._files.values(), *self._buffered.values()):
            os.close(handle)
        self._files, self._buffered = {}, {}

    def _open_file(self, file: str) -> tuple[int, bool]:
        self._check_open()
        return self._files[file]

    def _engines(self) -> list[_io.Engine]:
        return [self._engine] if self._starter is None else [self._engine, self._starter]

    def _start_engine(self) -> _io.Engine:
        if self._starter is None:
            try:
                memory = np.frombuffer(mmap.mmap(-1, START_STAGING), np.uint8)
                self._starter = _io.Engine("pread", START_THREADS, CHUNK_BYTES, memory)
            except RuntimeError as error:
                raise DiskError(f"nothing can be read: {error}") from None
        return self._starter

    def _buffered_file(self, file: str) -> int:
        """A descriptor through the page cache; -1 where that would not tell what it holds."""
        if file not in self._buffered:
            self._buffered[file] = open_cached(self._paths[file])
        handle, tells = self._buffered[file]
        return handle if tells else -1

    def _check_open(self) -> None:
        if not self._files:
            raise UsageError("the engine is closed: load the model again")
