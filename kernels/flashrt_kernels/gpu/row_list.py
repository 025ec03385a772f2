"""Numbers of rows or slots that only the device has counted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # numbers that one program looks at when a list is made


@triton.jit
def counted_before(blocks_ptr, block, BLOCKS: tl.constexpr):
    """The exclusive scan of the blocks' counts, at `block`."""
    index = tl.arange(0, BLOCKS)
    return tl.sum(tl.load(blocks_ptr + index, mask=index < block, other=0), axis=0)


@dataclass(frozen=True, slots=True)
class RowList:
    """The first `count` of `items` count, in ascending order of rows; what follows is undefined."""

    items: Tensor  # int32 [n]
    count: Tensor  # int32 [1]
    blocks: Tensor  # int32 [blocks of n]: counts, while a list is made

    @classmethod
    def empty(cls, n: int, device: torch.device | str) -> RowList:
        """Memory for up to `n` items."""
        items, count, blocks = (
            torch.zeros(size, dtype=torch.int32, device=device) for size in (n, 1, triton.cdiv(n, BLOCK))
        )
        return cls(items, count, blocks)
