"""The header of a GGUF file: metadata and tensor positions.

Parsed here rather than with the gguf library's reader, which maps the file and builds several numpy arrays per token:
14 s and 700 MiB for a vocabulary of 262144, against well under a second.

Format (versions 2 and 3, little-endian): magic, version, tensor count, metadata count; key, type, value; per tensor
its name, dimensions (fastest first), type and offset; padding to `general.alignment`; the data.
"""

from __future__ import annotations

import hashlib
import math
import struct
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashrt.arch.metadata import Metadata
from flashrt.errors import CheckpointError
from flashrt.storage.gguf_files import part_names, part_of
from flashrt.storage.sources.decoding import F32, Codec, Raw
from flashrt.storage.sources.files import refuse_pointer
from flashrt.storage.sources.stored import PLAIN_CODECS, StoredTensor, stored_tensor

MAGIC = b"GGUF"
MAX_HEADER = 1 << 27  # bytes; a vocabulary of 262144 with its merges takes 16 MB
MAX_TENSORS = 1 << 17
MAX_KEYS = 1 << 16
MAX_NAME = 1 << 16  # bytes of a key, or of a tensor's name
MAX_ITEMS = 1 << 22  # of all arrays together
MAX_DIMS = 4
_CHUNK = 1 << 20

# Type numbers of metadata values.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9


class TruncatedError(CheckpointError):
    """The file ends within its header."""


@dataclass(frozen=True)
class GgufHeader:
    """metadata: Python's own scalars, arrays of strings as lists, those of numbers and booleans as `array.array`."""

    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]
    digest: str  # of the header's bytes


class _Cursor:
    """Reads the file front to back; counts are checked against what it can still hold before anything is built."""

    def __init__(self, path: Path, size: int | None):
        self.path, self.size = path, path.stat().st_size if size is None else size
        self.limit = min(self.size, MAX_HEADER)
        self.file = path.open("rb")
        self.buffer, self.position, self.base = b"", 0, 0
        self.hash = hashlib.sha256()
        self.items = 0  # of all arrays so far

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self.buffer):
            self._fill(count)
            end = self.position + count
        result = self.buffer[self.position : end]
        self.position = end
        return result

    def _fill(self, count: int) -> None:
        if self.offset + count > self.limit:
            raise CheckpointError(f"{self.path} is truncated or damaged: its header runs beyond byte {self.limit}")
        self.base += self.position
        fresh = self.file.read(max(_CHUNK, count))
        self.hash.update(fresh)
        self.buffer, self.position = self.buffer[self.position :] + fresh, 0
        if len(self.buffer) < count:
            raise TruncatedError(f"{self.path} is truncated within its header")

    @property
    def offset(self) -> int:
        return self.base + self.position

    def number(self, code: str) -> Any:
        """One number, little-endian."""
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def count(self, item_bytes: int, limit: int) -> int:
        """A 64-bit count of items that take at least `item_bytes` each."""
        count: int = self.number("Q")
        if count > limit or count * item_bytes > self.limit - self.offset:
            raise CheckpointError(f"{self.path} is damaged: its header counts {count} items at byte {self.offset}")
        return count

    def string(self, limit: int = MAX_HEADER) -> str:
        return self.take(self.count(1, limit)).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _BOOL:
            return self.number("B") != 0
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array()
        raise CheckpointError(f"{self.path} is damaged: metadata of type {kind} at byte {self.offset}")

    def _array(self) -> list[str] | array[Any]:
        kind: int = self.number("I")
        code = "B" if kind == _BOOL else _NUMBERS.get(kind)
        if code is None and kind != _STRING:
            raise CheckpointError(f"{self.path} is damaged: an array of type {kind} at byte {self.offset}")
        item_bytes = 8 if code is None else struct.calcsize(f"<{code}")
        count = self.count(item_bytes, MAX_ITEMS - self.items)
        self.items += count
        return self._strings(count) if code is None else array(code, self.take(count * item_bytes))

    def _strings(self, count: int) -> list[str]:
        take, unpack = self.take, struct.Struct("<Q").unpack
        result = []
        for _ in range(count):
            (size,) = unpack(take(8))
            if size > self.limit:
                raise CheckpointError(f"{self.path} is damaged: a string of {size} bytes at byte {self.offset}")
            result.append(take(size).decode("utf-8", errors="replace"))
        return result


def read_gguf(path: Path) -> GgufHeader:
    """Metadata and tensors of a model, those of all its parts where it was split; `path` is the first.

    Raises CheckpointError as `read_gguf_header` does, and where parts are missing or do not belong together.
    """
    first = read_gguf_header(path)
    count = Metadata(first.metadata).integer("split.count", 1)
    if count <= 1:
        return first
    part = part_of(path.name)
    if part is None or part[2] != count:
        raise CheckpointError(
            f"{path} is one of {count} parts, and its name does not say which: expected NAME-00001-of-{count:05d}.gguf"
        )
    names = part_names(path.name)
    if part[1] != 1:
        raise CheckpointError(f"{path} is part {part[1]} of {count}: give the first, {names[0]}")
    if missing := [name for name in names if not path.with_name(name).exists()]:
        raise CheckpointError(f"{path} was split into {count} parts, of which {missing[0]} is missing")
    return _joined(path, [first, *(read_gguf_header(path.with_name(name)) for name in names[1:])])


def _joined(path: Path, parts: list[GgufHeader]) -> GgufHeader:
    """One header of all parts. The first has the metadata of the model."""
    tensors: dict[str, StoredTensor] = {}
    for i, part in enumerate(parts):
        fields = Metadata(part.metadata)
        if (fields.integer("split.no", 0), fields.integer("split.count", 1)) != (i, len(parts)):
            raise CheckpointError(f"{part_names(path.name)[i]} is not part {i + 1} of {len(parts)} of {path}")
        if twice := tensors.keys() & part.tensors.keys():
            raise CheckpointError(f"{part_names(path.name)[i]} holds {min(twice)} again: another part has it already")
        tensors |= part.tensors
    stated = Metadata(parts[0].metadata).integer("split.tensors.count", len(tensors))
    if stated != len(tensors):
        raise CheckpointError(f"the parts of {path} hold {len(tensors)} tensors, expected {stated}: one is damaged")
    digest = hashlib.sha256("".join(part.digest for part in parts).encode()).hexdigest()
    return GgufHeader(parts[0].metadata, tensors, digest)


def read_gguf_header(path: Path, size: int | None = None) -> GgufHeader:
    """Metadata and tensors of one file; `size` is what the whole has where `path` is only its beginning.

    Raises CheckpointError when it is damaged, cut short or of another version.
    """
    refuse_pointer(path)
    try:
        cursor = _Cursor(path, size)
        with cursor.file:
            return _read(cursor)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (struct.error, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _read(cursor: _Cursor) -> GgufHeader:
    path = cursor.path
    if cursor.size < 24 or cursor.take(4) != MAGIC:
        raise CheckpointError(f"{path} is not a GGUF file")
    version = cursor.number("I")
    if version not in (2, 3):
        raise CheckpointError(f"{path} is GGUF version {version}, expected 2 or 3 (little-endian)")
    tensor_count, key_count = cursor.count(24, MAX_TENSORS), cursor.count(12, MAX_KEYS)
    metadata = {}
    for _ in range(key_count):
        key = cursor.string(MAX_NAME)
        metadata[key] = cursor.value(cursor.number("I"))
    entries = [_entry(cursor) for _ in range(tensor_count)]
    alignment = Metadata(metadata).integer("general.alignment", 32)
    if not 0 < alignment <= 1 << 20:
        raise CheckpointError(f"{path} is damaged: its alignment is {alignment!r}")
    data = -(-cursor.offset // alignment) * alignment
    tensors = {entry[0]: _tensor(cursor, data, *entry) for entry in entries}
    if len(tensors) != tensor_count:
        raise CheckpointError(f"{path} is damaged: it names a tensor twice")
    return GgufHeader(metadata, tensors, cursor.hash.hexdigest())


def _entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name, dims = cursor.string(MAX_NAME), cursor.number("I")
    if not 0 < dims <= MAX_DIMS:
        raise CheckpointError(f"{cursor.path} is damaged: tensor {name!r} has {dims} dimensions")
    shape = struct.unpack(f"<{dims}Q", cursor.take(8 * dims))[::-1]
    if math.prod(shape) >= 1 << 62:
        raise CheckpointError(f"{cursor.path} is damaged: tensor {name!r} has shape {list(shape)}")
    return name, shape, cursor.number("I"), cursor.number("Q")


def _tensor(cursor: _Cursor, data: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> StoredTensor:
    dtype, codec = gguf_codec(kind)
    if codec is None:
        return StoredTensor(name, shape, dtype, None, cursor.path, data + offset, 0)
    if shape[-1] % codec.block:
        raise CheckpointError(f"{cursor.path}: tensor {name} has rows of {shape[-1]} {dtype} numbers, not whole blocks")
    size = math.prod(shape) // codec.block * codec.bytes
    if data + offset + size > cursor.size:
        raise CheckpointError(f"{cursor.path} is truncated: tensor {name} ends beyond the file's {cursor.size} bytes")
    return stored_tensor(name, shape, dtype, codec, cursor.path, data + offset, size)


_CODECS: dict[int, tuple[str, Codec | None]] = {}


def gguf_codec(kind: int) -> tuple[str, Codec | None]:
    """(name, codec) of a ggml type; the codec is None where the gguf library cannot decode it."""
    if kind not in _CODECS:
        _CODECS[kind] = _make_codec(kind)
    return _CODECS[kind]


def _make_codec(kind: int) -> tuple[str, Codec | None]:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import _type_traits, dequantize

    try:
        quant = GGMLQuantizationType(kind)
    except ValueError:
        return f"ggml type {kind}", None
    if quant.name in PLAIN_CODECS:
        return quant.name, PLAIN_CODECS[quant.name]
    if quant not in _type_traits:
        return quant.name, None
    block, size = GGML_QUANT_SIZES[quant]

    def decode(raw: Raw) -> F32:
        return np.asarray(dequantize(np.ascontiguousarray(raw), quant), np.float32)

    return quant.name, Codec(quant.name, block, size, decode)
