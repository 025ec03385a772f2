"""Tensors in files, read by ranges of rows or columns with bounded memory. Nothing is mapped."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flashrt.errors import CheckpointError

F32 = npt.NDArray[np.float32]
Raw = npt.NDArray[np.uint8]

COMPARED_NUMBERS = 4 << 20  # at a time
CACHE_BYTES = 256 << 20  # a matrix up to this size is kept, as stored, while its columns are read


@dataclass(frozen=True, slots=True)
class Codec:
    """How numbers are stored: `block` of them in `bytes`; `decode` turns [n, k * bytes] into float32 [n, k * block]."""

    name: str
    block: int
    bytes: int
    decode: Callable[[Raw], F32]


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


class TensorReader:
    """Reads tensors by name; keeps files open and at most one tensor's stored bytes."""

    def __init__(self, tensors: dict[str, StoredTensor]):
        self.tensors = tensors
        self._files: dict[Path, int] = {}
        self._cached: tuple[tuple[str, int], Raw] | None = None

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()
        self._cached = None

    def rows(self, name: str, start: int, stop: int, expert: int | None = None) -> F32:
        """Rows start:stop of a matrix (or of slice `expert` of a stack of them), float32 [stop - start, columns]."""
        return self._tensor(name)[1].decode(self.stored_rows(name, start, stop, expert))

    def stored_rows(self, name: str, start: int, stop: int, expert: int | None = None) -> Raw:
        """The same rows as they are stored, uint8 [stop - start, bytes of a row]."""
        tensor, _ = self._tensor(name)
        first = start + self._first_row(tensor, expert)
        raw = self._read(tensor, first * tensor.row_bytes, (stop - start) * tensor.row_bytes)
        return raw.reshape(stop - start, tensor.row_bytes)

    def vector(self, name: str) -> F32:
        tensor, codec = self._tensor(name)
        return codec.decode(self._read(tensor, 0, tensor.nbytes).reshape(1, -1)).reshape(-1)

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
        first_block, last_block = start // codec.block, -(-stop // codec.block)
        raw = self._column_bytes(tensor, expert, first_block * codec.bytes, last_block * codec.bytes)
        skip = start - first_block * codec.block
        return np.ascontiguousarray(codec.decode(raw)[:, skip : skip + stop - start].T)

    def stored_columns(self, name: str, start: int, stop: int, expert: int | None = None) -> Raw:
        """Columns start:stop of a matrix, whole blocks, as they are stored: uint8 [rows, bytes]."""
        tensor, codec = self._tensor(name)
        if start % codec.block or stop % codec.block:
            raise CheckpointError(f"tensor {name}: columns {start}:{stop} are not whole blocks of {codec.block}")
        return self._column_bytes(tensor, expert, start // codec.block * codec.bytes, stop // codec.block * codec.bytes)

    def _column_bytes(self, tensor: StoredTensor, expert: int | None, start: int, stop: int) -> Raw:
        """Bytes start:stop of every row, contiguous [rows, stop - start]."""
        rows, first = tensor.shape[-2], self._first_row(tensor, expert)
        if rows * tensor.row_bytes <= CACHE_BYTES:
            key = (tensor.name, first)
            if self._cached is None or self._cached[0] != key:
                self._cached = None  # before the next one is read, so that only one is held
                raw = self._read(tensor, first * tensor.row_bytes, rows * tensor.row_bytes)
                self._cached = key, raw.reshape(rows, tensor.row_bytes)
            return np.ascontiguousarray(self._cached[1][:, start:stop])
        result = np.empty((rows, stop - start), np.uint8)
        for row in range(rows):
            result[row] = self._read(tensor, (first + row) * tensor.row_bytes + start, stop - start)
        return result

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
        if offset < 0 or size < 0 or offset + size > tensor.nbytes:
            raise CheckpointError(
                f"tensor {tensor.name}: bytes {offset}..{offset + size} asked for, of {tensor.nbytes}"
            )
        result = np.empty(size, np.uint8)
        view, done = result.data, 0
        try:
            descriptor = self._open(tensor.path)
            while done < size:
                count = os.preadv(descriptor, [view[done:]], tensor.offset + offset + done)
                if count == 0:
                    raise CheckpointError(f"{tensor.path} is truncated: tensor {tensor.name} ends beyond the file")
                done += count
        except OSError as error:
            raise CheckpointError(f"cannot read {tensor.path}: {error.strerror}") from error
        return result

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
