"""The header of a safetensors file, read with bounds: it comes from anywhere and may be damaged or hostile.

Format: eight bytes (little-endian length of the header), a JSON object {name: {dtype, shape, data_offsets}}, the data.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TypeGuard

from flashrt.errors import CheckpointError
from flashrt.storage.sources.tensors import PLAIN_CODECS, StoredTensor, stored_tensor

MAX_HEADER = 100 << 20  # the limit of the reference implementation
MAX_DIMS = 8


def read_header(path: Path) -> tuple[dict[str, StoredTensor], str]:
    """Every tensor of the file and a digest of the header. Raises CheckpointError."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(MAX_HEADER, size - 8):
                raise CheckpointError(f"{path} is not a safetensors file, or is truncated: header of {length} bytes")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if len(text) != length:
        raise CheckpointError(f"{path} is truncated within its header")
    entries = _parse(text, path)
    tensors = {}
    for name, entry in entries.items():
        if name != "__metadata__":
            tensors[name] = _tensor(name, entry, path, 8 + length, size - 8 - length)
    return tensors, hashlib.sha256(text).hexdigest()


def _parse(text: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise CheckpointError(f"{path}: the safetensors header names a key twice")
        return result

    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the safetensors header is not valid JSON") from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: the safetensors header is not a JSON object")
    return entries


def _tensor(name: str, entry: Any, path: Path, data: int, size: int) -> StoredTensor:
    if not isinstance(entry, dict):
        raise CheckpointError(f"{path}: the header entry of tensor {name!r} is not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or not _naturals(shape) or not _naturals(offsets):
        raise CheckpointError(f"{path}: the header entry of tensor {name!r} is malformed")
    if len(shape) > MAX_DIMS or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{path}: the header entry of tensor {name!r} is malformed")
    if offsets[1] > size:
        raise CheckpointError(
            f"{path} is truncated: tensor {name!r} ends at byte {offsets[1]} of the data, which has {size}"
        )
    begin, end = offsets
    return stored_tensor(name, tuple(shape), dtype, PLAIN_CODECS.get(dtype), path, data + begin, end - begin)


def _naturals(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 62 for item in value)
