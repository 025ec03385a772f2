"""Keys and values of one sequence, every layer's in one preallocated array; cut back by setting a length."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from flashrt.spec import ModelSpec

Array = np.ndarray
Allocate = Callable[[Sequence[int]], Array]


class KVCache:
    """`layers[i]` is [kv_heads, capacity, 2, head_dim]: K and V of a token and head are contiguous.

    Elements are float32, or bfloat16 bits in uint16. Positions from `length` on hold garbage.
    """

    def __init__(self, spec: ModelSpec, capacity: int, allocate: Allocate) -> None:
        self.capacity = capacity
        self.length = 0
        self.layers = []
        for layer in spec.layers:
            attention = layer.attention
            self.layers.append(allocate((attention.kv_heads, capacity, 2, attention.head_dim)))

    def truncate(self, length: int) -> None:
        """Forget the tokens from position `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot cut a sequence of {self.length} tokens back to {length}")
        self.length = length
