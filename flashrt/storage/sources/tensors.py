"""Tensors in files, read by ranges of rows or columns with bounded memory. Nothing is mapped."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flashrt.errors import CheckpointError
from flashrt.storage.sources.decoding import F32, Codec, Raw, decode_columns, decode_rows

COMPARED_NUMBERS = 4 << 20  # at a time
CACHE_BYTES = 256 << 20  # of a matrix whose columns are read: so much of it is kept, as stored
AHEAD_BYTES = 16 << 20  # that the system is asked to read behind what was read


def _decode_f32(raw: Raw) -> F32:
    return raw.view("<f4").astype(np.float32, copy=False)


def _decode_bf16(raw: Raw) -> F32:
    return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)


PLAIN_CODECS = {
    "F32": Codec("F32", 1, 4, _decode_f32),
    "F16": Codec("F16", 1, 2, lambda raw: raw.view("<f2").astype(np.float32)),
    "BF16": Codec("BF16", 1, 2, _decode_bf16),
    "F64": Codec("F64", 1, 8, lambda raw: raw.view("<f8").astype(np.float32)),
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies. The last dimension is contiguous; `codec` is None for a type that cannot be read."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    codec: Codec | None
    path: Path
    offset: int
    nbytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one run along the last dimension."""
        assert self.codec is not None
        return self.shape[-1] // self.codec.block * self.codec.bytes


@dataclass(frozen=True, slots=True)
class _Stripe:
    """Bytes begin:end of every row of one matrix, uint8 [rows, end - begin]; `of` is its tensor and first row."""

    of: tuple[str, int]
    begin: int
    end: int
    raw: Raw


class TensorReader:
    """Reads tensors by name; keeps files open and at most one tensor's stored bytes."""

    def __init__(self, tensors: dict[str, StoredTensor]):
        self.tensors = tensors
        self._files: dict[Path, int] = {}
        self._kept: _Stripe | None = None

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()
        self._kept = None

    @property
    def paths(self) -> set[Path]:
        """The files that tensors lie in."""
        return {tensor.path for tensor in self.tensors.values()}

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
        first = start + self._first_row(tensor, expert)
        raw = self._read(tensor, first * tensor.row_bytes, (stop - start) * tensor.row_bytes)
        return raw.reshape(stop - start, tensor.row_bytes)

    def vector(self, name: str) -> F32:
        tensor, codec = self._tensor(name)
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
        begin, end = start // codec.block * codec.bytes, -(-stop // codec.block) * codec.bytes
        stripe = self._stripe(tensor, self._first_row(tensor, expert), begin, end)
        shift = stripe.begin // codec.bytes * codec.block
        return decode_columns(codec, stripe.raw, start - shift, stop - shift)

    def stored_columns(self, name: str, start: int, stop: int, expert: int | None = None) -> Raw:
        """Columns start:stop of a matrix, whole blocks, as they are stored: uint8 [rows, bytes]."""
        tensor, codec = self._tensor(name)
        if start % codec.block or stop % codec.block:
            raise CheckpointError(f"tensor {name}: columns {start}:{stop} are not whole blocks of {codec.block}")
        begin, end = start // codec.block * codec.bytes, stop // codec.block * codec.bytes
        stripe = self._stripe(tensor, self._first_row(tensor, expert), begin, end)
        return np.ascontiguousarray(stripe.raw[:, begin - stripe.begin : end - stripe.begin])

    def _stripe(self, tensor: StoredTensor, first: int, begin: int, end: int) -> _Stripe:
        """Bytes begin:end of the rows of a matrix, at least: as many as CACHE_BYTES hold, and kept for the next."""
        kept, self._kept = self._kept, None  # before the next one is read, so that only one is held
        if kept is None or kept.of != (tensor.name, first) or begin < kept.begin or end > kept.end:
            del kept
            rows, unit = tensor.shape[-2], tensor.codec.bytes if tensor.codec else 1
            end = min(max(begin + CACHE_BYTES // rows // unit * unit, end), tensor.row_bytes)
            if end == tensor.row_bytes and rows * end <= CACHE_BYTES:
                begin = 0
            kept = _Stripe((tensor.name, first), begin, end, self._read_stripe(tensor, first, begin, end))
        self._kept = kept
        return kept

    def _read_stripe(self, tensor: StoredTensor, first: int, begin: int, end: int) -> Raw:
        rows = tensor.shape[-2]
        if end - begin == tensor.row_bytes:
            raw = self._read(tensor, first * tensor.row_bytes, rows * tensor.row_bytes)
            return raw.reshape(rows, tensor.row_bytes)
        raw = np.empty((rows, end - begin), np.uint8)
        for row in range(rows):
            self._read_into(tensor, (first + row) * tensor.row_bytes + begin, raw[row])
        return raw

    def _tensor(self, name: str) -> tuple[StoredTensor, Codec]:
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


def stored_tensor(
    name: str, shape: tuple[int, ...], dtype: str, codec: Codec | None, path: Path, offset: int, nbytes: int
) -> StoredTensor:
    """A StoredTensor whose size is checked against its shape. Raises CheckpointError."""
    if codec is not None:
        numbers = math.prod(shape)
        if shape and shape[-1] % codec.block:
            raise CheckpointError(f"{path}: tensor {name} has rows of {shape[-1]} {dtype} numbers, not whole blocks")
        if numbers // codec.block * codec.bytes != nbytes:
            raise CheckpointError(f"{path}: tensor {name} {dtype} {list(shape)} does not take {nbytes} bytes")
    return StoredTensor(name, shape, dtype, codec, path, offset, nbytes)
