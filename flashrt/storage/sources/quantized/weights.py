"""A matrix that a file stores as several tensors: codes, scales and whatever else its weights are computed from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from flashrt.storage.sources.decoding import F32, Codec, Raw
from flashrt.storage.sources.stored import PLAIN_CODECS, StoredTensor
from flashrt_kernels.stored import STORED


class Region(NamedTuple):
    """Rows and columns (first, last + 1) of a matrix, or of slice `expert` of a stack of them."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    expert: int | None = None


Read = Callable[[StoredTensor, Region], Raw]  # a region of a stored tensor, uint8 [rows, bytes]


class QuantizedWeights(Protocol):
    """How the weights of a matrix, or of a stack of them, are computed from the tensors of a file."""

    @property
    def name(self) -> str:
        """The name that the matrix has where it is not quantized."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def label(self) -> str:
        """How they are quantized, in words."""

    @property
    def members(self) -> tuple[StoredTensor, ...]:
        """Every tensor that belongs to the matrix as it is stored, those that are not read included."""

    def floats(self, read: Read, region: Region) -> F32:
        """The weights of a region, float32 [rows, columns]."""

    def keeps(self, read: Read | None) -> str | None:
        """The format of GGUF in whose blocks these weights are stored bit for bit; None where there is none.

        Scales are read for it: those that a block cannot hold exactly rule it out. With None in place of `read` it is
        what headers let expect.
        """

    def blocks(self, read: Read, region: Region) -> Raw:
        """A region, of whole blocks, in the format that `keeps` gives: uint8 [rows, bytes]."""


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A matrix as the model names it, read as a `stored.StoredTensor` is. `kept` is what `keeps` gave."""

    weights: QuantizedWeights
    kept: str | None

    @property
    def name(self) -> str:
        return self.weights.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weights.shape

    @property
    def dtype(self) -> str:
        return self.kept or self.weights.label

    @property
    def codec(self) -> Codec:
        return PLAIN_CODECS["F32"] if self.kept is None else _KEPT[self.kept]

    @property
    def nbytes(self) -> int:
        """Bytes of all that it is computed from."""
        return sum(member.nbytes for member in self.weights.members)

    @property
    def paths(self) -> set[Path]:
        return {member.path for member in self.weights.members}

    def raw(self, read: Read, region: Region) -> Raw:
        """A region as `codec` decodes it, uint8 [rows, bytes]."""
        if self.kept is not None:
            return self.weights.blocks(read, region)
        return np.ascontiguousarray(self.weights.floats(read, region), np.float32).view(np.uint8)


def _native(raw: Raw) -> F32:
    raise AssertionError("decoded by the native code")


_KEPT = {name: Codec(name, STORED[name].numbers, STORED[name].nbytes, _native) for name in ("Q4_0", "Q8_0", "MXFP4")}
