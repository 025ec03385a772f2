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
    """The first `count` of `items` count, in ascending order; what follows is undefined."""

    items: Tensor  # int32 [n]
    count: Tensor  # int32 [1]

    @classmethod
    def empty(cls, n: int, device: torch.device | str) -> RowList:
        """Memory for up to `n` items."""
        return cls(torch.empty(n, dtype=torch.int32, device=device), torch.zeros(1, dtype=torch.int32, device=device))


def block_counts(n: int, device: torch.device) -> Tensor:
    """Memory for one count per block of `n` numbers: int32 [blocks]."""
    return torch.empty(max(triton.cdiv(n, BLOCK), 1), dtype=torch.int32, device=device)
