"""Second moments of queries and keys before RoPE: all that labels are fitted to. They do not grow with the text."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from flashrt.storage.atomic import disk_errors, replacing

Array = np.ndarray


class Moments:
    """Sums over all positions seen, by KV head, float64; those of queries over the heads of its group."""

    def __init__(self, group: int, heads: int, dim: int) -> None:
        """group: queries' heads of each of so many KV heads"""
        self.count = 0  # positions
        self.group = group
        self.queries = np.zeros((heads, dim, dim))  # of q qᵀ
        self.keys = np.zeros((heads, dim, dim))  # of k kᵀ
        self.key_sums = np.zeros((heads, dim))

    def add(self, queries: Array, keys: Array) -> None:
        """Take in positions: float32 [T, heads, head_dim] and [T, kv_heads, head_dim]."""
        for head in range(len(self.keys)):
            own = queries[:, head * self.group : (head + 1) * self.group].reshape(-1, queries.shape[-1])
            own, key = own.astype(np.float64), keys[:, head].astype(np.float64)
            self.queries[head] += own.T @ own
            self.keys[head] += key.T @ key
            self.key_sums[head] += key.sum(axis=0)
        self.count += len(keys)

    def means(self, head: int) -> tuple[Array, Array, Array]:
        """Means of q qᵀ, of k kᵀ and of k, float64. Needs a position."""
        return (
            self.queries[head] / (self.count * self.group),
            self.keys[head] / self.count,
            self.key_sums[head] / self.count,
        )

    def save(self, path: Path) -> None:
        """Raises DiskError."""
        with disk_errors(path.parent), replacing(path) as file:
            np.savez(
                file, count=self.count, group=self.group, queries=self.queries, keys=self.keys, key_sums=self.key_sums
            )

    @classmethod
    def load(cls, path: Path) -> Moments:
        """What `save` wrote."""
        with np.load(path) as stored:
            moments = cls(int(stored["group"]), *stored["key_sums"].shape)
            moments.count = int(stored["count"])
            moments.queries, moments.keys = stored["queries"], stored["keys"]
            moments.key_sums = stored["key_sums"]
        return moments
