"""How caches hold keys and values: the contract between stores, kernels and the reference.

A token's key of a KV head lies before its value. `f32` and `bf16` are numbers as they are. `int8` are rows of Q8_0
blocks, `int4` a key as one and a value as a row of Q4_0 blocks (`flashrt_kernels.rows`), padded with zeros to whole
chunks of 64 numbers. Keys are not held in four bits: some of their channels are 100 times as large as others, and what
four bits leave of these is no attention any more.

Caches of *keys only* hold no values: these are the first numbers of keys. Four bits are none for them.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from flashrt_kernels.rows import Codec, align, row_bytes

if TYPE_CHECKING:
    import numpy as np

CHUNK = 64  # numbers


class KvCodec(enum.Enum):
    """`value` is the name in options and files."""

    F32 = "f32"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"

    @property
    def dtype(self) -> type[np.generic]:
        """Of the items of a cache; uint16 has the bits of a bfloat16."""
        import numpy as np  # here, because what only plans does without

        types: dict[int, type[np.generic]] = {4: np.float32, 2: np.uint16, 1: np.uint8}
        return types[self.item_bytes]

    @property
    def item_bytes(self) -> int:
        """Bytes of an item of a cache."""
        return _ITEM_BYTES.get(self, 1)

    @property
    def blocks(self) -> tuple[Codec, Codec] | None:
        """What keys and values are rows of; None: of numbers."""
        return _BLOCKS.get(self)

    def pair(self, head_dim: int, keys_only: bool = False) -> tuple[int, int]:
        """Shape of a key and its value: [2, head_dim], or [1, bytes] of rows of blocks; [1, head_dim] of keys only."""
        rows = 1 if keys_only else 2
        if self.blocks is None:
            return rows, head_dim
        return 1, sum(row_bytes(codec, align(head_dim, CHUNK)) for codec in self.blocks[:rows])

    def nbytes(self, head_dim: int, keys_only: bool = False) -> int:
        """Bytes of a key and its value."""
        rows, items = self.pair(head_dim, keys_only)
        return rows * items * self.item_bytes


_ITEM_BYTES = {KvCodec.F32: 4, KvCodec.BF16: 2}
_BLOCKS = {KvCodec.INT8: (Codec.Q8_0, Codec.Q8_0), KvCodec.INT4: (Codec.Q8_0, Codec.Q4_0)}


def kv_codec_of(cache: np.ndarray, head_dim: int) -> KvCodec:
    """What an array [.., *pair] of keys and values of heads of `head_dim` numbers is. Raises ValueError."""
    for codec in KvCodec:
        if cache.dtype == codec.dtype and cache.shape[-2:] == codec.pair(head_dim):
            return codec
    raise ValueError(f"kv: {cache.dtype} of shape {cache.shape} holds no keys and values of heads of {head_dim}")
