"""Fills pinned memory from a GGUF file: rows as the file has them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flashrt.cache.device import Device, Progress
from flashrt.errors import DiskError
from flashrt.storage.direct import open_cached
from flashrt.storage.kept_rows import check_rows
from flashrt.storage.layout import Block, TensorLayout
from flashrt.storage.places import LARGEST_ROW, source_file
from flashrt.storage.reader import Reader, Ticket
from flashrt.storage.safetensors_file import PAGE
from flashrt.storage.source_file import SourceFile
from flashrt_kernels.rows import row_bytes

BUFFER_BYTES = 256 << 10  # of which a read on boundaries of pages wastes up to two pages

Array = np.ndarray

assert LARGEST_ROW + 2 * PAGE <= BUFFER_BYTES


@dataclass(frozen=True, slots=True)
class _Piece:
    """Whole rows of a tensor from byte `offset` of its file on, and their place: what one read brings.

    block: what is there once it is put
    """

    tensor: TensorLayout
    offset: int
    place: Array
    block: Block | None


class FromFile:
    """Fills memory from the files of an outline.

    The reader's staging is what rows arrive in: nothing else is read from an outline meanwhile.
    """

    def __init__(self, device: Device, reader: Reader) -> None:
        self._device, self._reader, self._layout = device, reader, reader.pack.layout

    def fill(self, items: Iterable[tuple[Block, Array]], arrived: Progress) -> None:
        """Raises PackError where a file is not what it was, CheckpointError for weights not finite, and DiskError."""
        with ExitStack() as stack:
            files = {}
            for number, source in enumerate(self._reader.pack.sources):
                files[source_file(number)] = _File(source)
                stack.callback(files[source_file(number)].close)
            flight = _Flight(self._reader, files, arrived)
            stack.callback(self._reader.settle)
            for block, memory in items:
                tensor = self._layout.tensors[block.tensor]
                if tensor.source is None:
                    flight.finish()  # tensors arrive in their order
                    self._device.fill([(block, memory)], arrived)
                    continue
                for piece in _pieces(tensor, block, memory):
                    flight.add(piece)
            flight.finish()


def _pieces(tensor: TensorLayout, block: Block, memory: Array) -> Iterator[_Piece]:
    """What is read of a block, in order."""
    size = row_bytes(tensor.codec, tensor.columns)
    step = (BUFFER_BYTES - 2 * PAGE) // size * size
    for start in range(0, block.nbytes, step):
        place = memory[start : min(start + step, block.nbytes)]
        last = start + step >= block.nbytes
        yield _Piece(tensor, block.offset + start, place, block if last else None)


class _File:
    """One file of an outline, open around the page cache and through it."""

    def __init__(self, source: SourceFile) -> None:
        self._source, self._path = source, Path(source.path)
        self._handle, self._direct = source.open()
        try:
            self._cached, self._tells = open_cached(self._path)
        except DiskError:
            os.close(self._handle)
            raise

    def check(self) -> None:
        """Raises PackError where the file has changed, or another took its place as it was opened."""
        self._source.check(self._handle)
        self._source.check(self._cached)

    def close(self) -> None:
        os.close(self._handle)
        os.close(self._cached)

    def begin(self, reader: Reader, piece: _Piece, buffer: Array) -> tuple[Ticket, Array]:
        """Start to read a piece into a page-aligned buffer; where it will be, uint8 [bytes]."""
        begin, nbytes = piece.offset // PAGE * PAGE, piece.place.size
        end = min(-(-(piece.offset + nbytes) // PAGE) * PAGE, self._source.nbytes)
        cached = self._cached if self._tells else -1
        read = reader.read_at_start(self._handle, self._direct, begin, buffer[: end - begin], cached)
        return Ticket(self._path, read), buffer[piece.offset - begin :][:nbytes]


class _Flight:
    """Reads under way, as many as the reader's staging has room for; they land in the order in which they began."""

    def __init__(self, reader: Reader, files: dict[str, _File], arrived: Progress) -> None:
        self._reader, self._files, self._arrived = reader, files, arrived
        count = reader.staging.size // BUFFER_BYTES
        self._free = deque(reader.staging[: count * BUFFER_BYTES].reshape(count, BUFFER_BYTES))
        self._flying: deque[tuple[_Piece, Ticket, Array, Array]] = deque()

    def add(self, piece: _Piece) -> None:
        """Begin to read a piece, once there is room. Raises what reading others failed with."""
        if not self._free:
            self._land()
        buffer = self._free.popleft()
        self._flying.append((piece, *self._files[piece.tensor.file].begin(self._reader, piece, buffer), buffer))

    def finish(self) -> None:
        """Return when every piece is at its place. Raises what reading failed with."""
        while self._flying:
            self._land()

    def _land(self) -> None:
        piece, ticket, values, buffer = self._flying.popleft()
        ticket.wait()
        self._files[piece.tensor.file].check()
        rows = values.reshape(-1, row_bytes(piece.tensor.codec, piece.tensor.columns))
        check_rows(piece.tensor.name, piece.tensor.codec, rows, rows.shape)
        piece.place[:] = values
        self._free.append(buffer)
        if piece.block is not None:
            self._arrived(piece.block.nbytes)
