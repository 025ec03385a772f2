"""Where the tensors of a file lie, and how plain numbers are stored."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flashrt.errors import CheckpointError
from flashrt.storage.sources.decoding import F32, Codec, Raw


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
    """Where one tensor lies. The last dimension is contiguous; `codec` is None where the type is not read as floats."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    codec: Codec | None
    path: Path
    offset: int
    nbytes: int

    @property
    def paths(self) -> set[Path]:
        return {self.path}

    @property
    def unit(self) -> tuple[int, int]:
        """Elements that are stored together, and the bytes that these take."""
        if self.codec is not None:
            return self.codec.block, self.codec.bytes
        return 1, self.nbytes // max(math.prod(self.shape), 1)

    @property
    def row_bytes(self) -> int:
        """Bytes of one run along the last dimension."""
        elements, nbytes = self.unit
        return self.shape[-1] // elements * nbytes


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
