"""Keys and values of one sequence, every layer's in one preallocated array; cut back by setting a length."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from flashrt.spec import ModelSpec

Array = np.ndarray
Allocate = Callable[[Sequence[int]], Array]


class KVCache:
    """`layers[i]` is [kv_heads, capacity, 2, head_dim]: K and V of a token and head are contiguous.

    Elements are float32, or bfloat16 bits in uint16. Positions from `length` on hold garbage, or the tokens of a tree:
    `tree` names the parent of each, a token before it, or -1 for the end of the sequence.
    """

    def __init__(self, spec: ModelSpec, capacity: int, allocate: Allocate) -> None:
        self.capacity = capacity
        self.length = 0
        self.tree: tuple[int, ...] = ()
        self.layers = []
        for layer in spec.layers:
            attention = layer.attention
            self.layers.append(allocate((attention.kv_heads, capacity, 2, attention.head_dim)))

    def truncate(self, length: int) -> None:
        """Forget the tokens from position `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot cut a sequence of {self.length} tokens back to {length}")
        self.length, self.tree = length, ()

    def append(self, count: int) -> None:
        """Make the `count` tokens that were written behind the sequence part of it."""
        self.length, self.tree = self.length + count, ()

    def commit(self, path: Sequence[int]) -> None:
        """Make the tokens `path` of the tree part of the sequence, each the parent of the next; forget the others."""
        known = all(0 <= node < len(self.tree) for node in path)
        if not known or any(self.tree[node] != parent for node, parent in zip(path, [-1, *path], strict=False)):
            raise ValueError(f"{list(path)} is not a path through the tree {list(self.tree)}")
        for layer in self.layers:
            for depth, node in enumerate(path):
                if node != depth:  # always behind its place: nothing is overwritten that is still to come
                    layer[:, self.length + depth] = layer[:, self.length + node]
        self.append(len(path))
