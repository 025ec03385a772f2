"""Tensors in files, read by ranges of rows or columns with bounded memory. Nothing is mapped."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flashrt.errors import CheckpointError
from flashrt.storage.sources.decoding import F32, Codec, Raw, decode_columns, decode_rows
from flashrt.storage.sources.quantized.weights import QuantizedTensor, Region
from flashrt.storage.sources.stored import StoredTensor

COMPARED_NUMBERS = 4 << 20  # at a time
CACHE_BYTES = 256 << 20  # of matrices whose columns are read: so much of them is kept, as stored
STRIPE_BYTES = 96 << 20  # of one of them: two that are read in turn, as gate and up, are kept with their scales
AHEAD_BYTES = 16 << 20  # that the system is asked to read behind what was read

Tensor = StoredTensor | QuantizedTensor


@dataclass(frozen=True, slots=True)
class _Stripe:
    """Bytes begin:end of every row of one matrix, uint8 [rows, end - begin]; `of` is its tensor and first row."""

    of: tuple[str, int]
    begin: int
    end: int
    raw: Raw

    def holds(self, of: tuple[str, int], begin: int, end: int) -> bool:
        return self.of == of and self.begin <= begin and end <= self.end


class TensorReader:
    """Reads tensors by name; keeps files open and at most CACHE_BYTES of what is stored."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors = tensors
        self._files: dict[Path, int] = {}
        self._stripes: list[_Stripe] = []  # the one that was used last comes last

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()
        self._stripes.clear()

    @property
    def paths(self) -> set[Path]:
        """The files that tensors lie in."""
        return set().union(*(tensor.paths for tensor in self.tensors.values()))

    def close_file(self, path: Path) -> None:
        """Let go of a file, until something is read from it again."""
        if path in self._files:
            os.close(self._files.pop(path))

    def rows(self, name: str, start: int, stop: int, expert: int | None = None) -> F32:
        """Rows start:stop of a matrix (or of slice `expert` of a stack of them), float32 [stop - start, columns]."""
        return decode_rows(self._tensor(name)[1], self.stored_rows(name, start, stop, expert))

    def stored_rows(self, name: str, start: int, stop: int, expert: int | None = None) -> Raw:
        """The same rows as they are stored, uint8 [stop - start, bytes of a row]."""
        tensor, _ = self._tensor(name)
        return self._raw(tensor, Region((start, stop), (0, tensor.shape[-1]), expert))

    def vector(self, name: str) -> F32:
        tensor, codec = self._tensor(name)
        if isinstance(tensor, QuantizedTensor):
            raise CheckpointError(f"tensor {name} is quantized ({tensor.dtype}), expected plain numbers")
        return decode_rows(codec, self._read(tensor, 0, tensor.nbytes).reshape(1, -1)).reshape(-1)

    def equal(self, a: str, b: str) -> bool:
        """Whether two stored matrices have the same shape and hold the same numbers."""
        shape = self.tensors[a].shape
        if shape != self.tensors[b].shape:
            return False
        step = max(COMPARED_NUMBERS // shape[1], 1)
        pieces = ((start, min(start + step, shape[0])) for start in range(0, shape[0], step))
        return all(np.array_equal(self.rows(a, *piece), self.rows(b, *piece)) for piece in pieces)

    def columns(self, name: str, start: int, stop: int, expert: int | None = None) -> F32:
        """Columns start:stop of a matrix, transposed: float32 [stop - start, rows]."""
        tensor, codec = self._tensor(name)
        first, last = start // codec.block * codec.block, -(-stop // codec.block) * codec.block
        raw = self._raw(tensor, Region((0, tensor.shape[-2]), (first, last), expert))
        return decode_columns(codec, raw, start - first, stop - first)

    def stored_columns(self, name: str, start: int, stop: int, expert: int | None = None) -> Raw:
        """Columns start:stop of a matrix, whole blocks, as they are stored: uint8 [rows, bytes]."""
        tensor, codec = self._tensor(name)
        if start % codec.block or stop % codec.block:
            raise CheckpointError(f"tensor {name}: columns {start}:{stop} are not whole blocks of {codec.block}")
        return np.ascontiguousarray(self._raw(tensor, Region((0, tensor.shape[-2]), (start, stop), expert)))

    def read(self, tensor: StoredTensor, region: Region) -> Raw:
        """A region of a stored tensor, whole blocks: uint8 [rows, bytes], which may be a part of what is kept."""
        (start, stop), first = region.rows, self._first_row(tensor, region.expert)
        elements, nbytes = tensor.unit
        begin, end = (column // elements * nbytes for column in region.columns)
        if (begin, end) == (0, tensor.row_bytes):
            raw = self._read(tensor, (first + start) * end, (stop - start) * end)
            return raw.reshape(stop - start, end)
        stripe = self._stripe(tensor, first, begin, end)
        return stripe.raw[start:stop, begin - stripe.begin : end - stripe.begin]

    def _raw(self, tensor: Tensor, region: Region) -> Raw:
        return tensor.raw(self.read, region) if isinstance(tensor, QuantizedTensor) else self.read(tensor, region)

    def _stripe(self, tensor: StoredTensor, first: int, begin: int, end: int) -> _Stripe:
        """Bytes begin:end of the rows of a matrix, at least: as many as STRIPE_BYTES hold, and kept for the next."""
        of = tensor.name, first
        found = next((stripe for stripe in self._stripes if stripe.holds(of, begin, end)), None)
        if found is None:
            rows, unit, limit = tensor.shape[-2], tensor.unit[1], min(STRIPE_BYTES, CACHE_BYTES)
            end = min(max(begin + limit // rows // unit * unit, end), tensor.row_bytes)
            if end == tensor.row_bytes and rows * end <= limit:
                begin = 0
            self._make_room(rows * (end - begin), of)  # before it is read
            found = _Stripe(of, begin, end, self._read_stripe(tensor, first, begin, end))
        else:
            self._stripes.remove(found)
        self._stripes.append(found)
        return found

    def _make_room(self, size: int, of: tuple[str, int]) -> None:
        """Let go of other stripes of the same matrix, and of those that were not used for longest."""
        self._stripes = [stripe for stripe in self._stripes if stripe.of != of]
        while self._stripes and sum(stripe.raw.nbytes for stripe in self._stripes) + size > CACHE_BYTES:
            self._stripes.pop(0)

    def _read_stripe(self, tensor: StoredTensor, first: int, begin: int, end: int) -> Raw:
        rows = tensor.shape[-2]
        if end - begin == tensor.row_bytes:
            raw = self._read(tensor, first * tensor.row_bytes, rows * tensor.row_bytes)
            return raw.reshape(rows, tensor.row_bytes)
        raw = np.empty((rows, end - begin), np.uint8)
        for row in range(rows):
            self._read_into(tensor, (first + row) * tensor.row_bytes + begin, raw[row])
        return raw

    def _tensor(self, name: str) -> tuple[Tensor, Codec]:
        tensor = self.tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"tensor {name} is missing")
        if tensor.codec is None:
            raise CheckpointError(f"tensor {name} is stored as {tensor.dtype}, which is not supported")
        return tensor, tensor.codec

    @staticmethod
    def _first_row(tensor: StoredTensor, expert: int | None) -> int:
        return 0 if expert is None else expert * tensor.shape[-2]

    def _read(self, tensor: StoredTensor, offset: int, size: int) -> Raw:
        result = np.empty(max(size, 0), np.uint8)
        self._read_into(tensor, offset, result)
        return result

    def _read_into(self, tensor: StoredTensor, offset: int, out: Raw) -> None:
        """Read bytes of a tensor from `offset` on, and have the system read on behind them."""
        end = offset + out.size
        if offset < 0 or end > tensor.nbytes:
            raise CheckpointError(f"tensor {tensor.name}: bytes {offset}..{end} asked for, of {tensor.nbytes}")
        view, done = out.data, 0
        try:
            descriptor = self._open(tensor.path)
            while done < out.size:
                count = os.preadv(descriptor, [view[done:]], tensor.offset + offset + done)
                if count == 0:
                    raise CheckpointError(f"{tensor.path} is truncated: tensor {tensor.name} ends beyond the file")
                done += count
            ahead = min(AHEAD_BYTES, tensor.nbytes - end)
            if ahead > 0:
                os.posix_fadvise(descriptor, tensor.offset + end, ahead, os.POSIX_FADV_WILLNEED)
        except OSError as error:
            raise CheckpointError(f"cannot read {tensor.path}: {error.strerror}") from error

    def _open(self, path: Path) -> int:
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)
        return self._files[path]
