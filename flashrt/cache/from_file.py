"""Fills pinned memory from a GGUF file: rows as the file has them, to the places that they have in a pack."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flashrt.cache.device import Device, Progress
from flashrt.errors import DiskError
from flashrt.storage.direct import open_cached
from flashrt.storage.kept_rows import check_rows
from flashrt.storage.layout import Block, TensorLayout
from flashrt.storage.places import LARGEST_ROW, Places, Rows, neuron_codecs
from flashrt.storage.reader import Reader, Ticket
from flashrt.storage.safetensors_file import PAGE
from flashrt.storage.source_file import SourceFile
from flashrt_kernels.rows import MATRIX_ROWS, Codec, row_bytes

BUFFER_BYTES = 256 << 10  # of which a read on boundaries of pages wastes up to two pages

Array = np.ndarray
Put = Callable[[Array, int], None]  # rows of a file, uint8 [n, bytes], and the number of the first

assert LARGEST_ROW + 2 * PAGE <= BUFFER_BYTES


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows start:stop of a run of rows: what one read brings. `blocks` are there once it is put."""

    rows: Rows
    start: int
    stop: int
    codec: Codec
    put: Put
    tensor: str
    blocks: Sequence[Block] = ()

    @property
    def offset(self) -> int:
        return self.rows.offset + self.start * self.rows.row_bytes

    @property
    def nbytes(self) -> int:
        return (self.stop - self.start) * self.rows.row_bytes


class FromFile:
    """Fills `memory` (tensor → uint8 [bundles, stride]), which holds all of each tensor, from the files of an outline.

    The reader's staging is what rows arrive in: nothing else is read from an outline meanwhile.
    """

    def __init__(self, device: Device, reader: Reader, places: Places, memory: Mapping[str, Array]) -> None:
        self._device, self._reader, self._places, self._memory = device, reader, places, memory
        self._layout = reader.pack.layout

    def fill(self, items: Iterable[tuple[Block, Array]], arrived: Progress) -> None:
        """Raises PackError where a file is not what it was, CheckpointError for weights not finite, and DiskError."""
        with ExitStack() as stack:
            files = []
            for source in self._reader.pack.sources:
                files.append(_File(source))
                stack.callback(files[-1].close)
            flight = _Flight(self._reader, files, arrived)
            stack.callback(self._reader.settle)
            for name, group in itertools.groupby(items, key=lambda item: item[0].tensor):
                own = list(group)
                if name in self._places.tensors:
                    for piece in self._pieces(name, [block for block, _ in own]):
                        flight.add(piece)
                else:
                    flight.finish()  # tensors arrive in their order
                    self._device.fill(own, arrived)
            flight.finish()

    def _pieces(self, name: str, blocks: Sequence[Block]) -> Iterator[_Piece]:
        """What is read of a tensor, in order."""
        runs = deque(self._runs(self._layout.tensors[name]))
        while runs:
            rows, codec, put = runs.popleft()
            step = (BUFFER_BYTES - 2 * PAGE) // rows.row_bytes
            for start in range(0, rows.count, step):
                stop = min(start + step, rows.count)
                over = stop == rows.count and not runs
                yield _Piece(rows, start, stop, codec, put, name, blocks if over else ())

    def _runs(self, tensor: TensorLayout) -> Iterator[tuple[Rows, Codec, Put]]:
        """Runs of rows of a tensor, and what puts them to their places."""
        own, memory = self._places.tensors[tensor.name], self._memory[tensor.name]
        if tensor.codecs is None:
            first = 0
            for rows in own:
                view = memory[:, : MATRIX_ROWS * rows.row_bytes].reshape(-1, MATRIX_ROWS, rows.row_bytes)
                yield rows, tensor.codec, _scattered(view, rows, first)
                first += rows.count
            return
        along = neuron_codecs(tensor)
        for run, rows in enumerate(own):
            run, part = divmod(run, len(along) + 1)
            bundles = memory[run * tensor.run_stride : run * tensor.run_stride + tensor.run_bundles]
            at = sum(tensor.group * row_bytes(codec, tensor.columns) for codec in along[:part])
            if part < len(along):
                view = bundles[:, at : at + tensor.group * rows.row_bytes]
                yield rows, along[part], _scattered(view.reshape(-1, tensor.group, rows.row_bytes), rows, 0)
                continue
            size = row_bytes(tensor.codecs.down, tensor.group)
            view = bundles[:, at : at + tensor.columns * size].reshape(-1, tensor.columns, size)
            yield rows, tensor.codecs.down, _across(view)


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
        """Start to read a piece into a page-aligned buffer; where it will be, uint8 [rows, bytes]."""
        begin = piece.offset // PAGE * PAGE
        end = min(-(-(piece.offset + piece.nbytes) // PAGE) * PAGE, self._source.nbytes)
        cached = self._cached if self._tells else -1
        read = reader.read_at_start(self._handle, self._direct, begin, buffer[: end - begin], cached)
        rows = buffer[piece.offset - begin :][: piece.nbytes]
        return Ticket(self._path, read), rows.reshape(-1, piece.rows.row_bytes)


class _Flight:
    """Reads under way, as many as the reader's staging has room for; they land in the order in which they began."""

    def __init__(self, reader: Reader, files: Sequence[_File], arrived: Progress) -> None:
        self._reader, self._files, self._arrived = reader, files, arrived
        count = reader.staging.size // BUFFER_BYTES
        self._free = deque(reader.staging[: count * BUFFER_BYTES].reshape(count, BUFFER_BYTES))
        self._flying: deque[tuple[_Piece, Ticket, Array, Array]] = deque()

    def add(self, piece: _Piece) -> None:
        """Begin to read a piece, once there is room. Raises what reading others failed with."""
        if not self._free:
            self._land()
        buffer = self._free.popleft()
        self._flying.append((piece, *self._files[piece.rows.file].begin(self._reader, piece, buffer), buffer))

    def finish(self) -> None:
        """Return when every piece is at its place. Raises what reading failed with."""
        while self._flying:
            self._land()

    def _land(self) -> None:
        piece, ticket, rows, buffer = self._flying.popleft()
        ticket.wait()
        self._files[piece.rows.file].check()
        check_rows(piece.tensor, piece.codec, rows, rows.shape)
        piece.put(rows, piece.start)
        self._free.append(buffer)
        for block in piece.blocks:
            self._arrived(block.nbytes)


def _scattered(view: Array, rows: Rows, first: int) -> Put:
    """Puts rows, of which the first one's place is number `first`, into uint8 [bundles, rows of a bundle, bytes]."""

    def put(values: Array, start: int) -> None:
        bundles, within = np.divmod(first + rows.places(start, start + len(values)), view.shape[1])
        view[bundles, within] = values

    return put


def _across(view: Array) -> Put:
    """Puts rows of down, which run through all groups of neurons, into uint8 [groups, hidden, bytes of a part]."""

    def put(values: Array, start: int) -> None:
        parts = values.reshape(len(values), len(view), view.shape[2])
        view[:, start : start + len(values)] = parts.swapaxes(0, 1)

    return put
