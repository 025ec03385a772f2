"""The labels of one layer's keys, and the blocks that they choose for a row of a decode pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from flashrt.kv.base import Allocate, KvLimits
from flashrt.kv.choice import Choice, labelled
from flashrt.spec import Attention
from flashrt_kernels.labels import LABEL_TOKENS, label_shape

PIECE = 4 * LABEL_TOKENS  # positions labelled at a time: what their keys take in float32 is not planned

Array = np.ndarray


class LabelIndex:
    """Positions are labelled in whole groups of 16: products of one shape give a key the same label in every pass."""

    @classmethod
    def nbytes(cls, attention: Attention, limits: KvLimits) -> int:
        """Bytes of all labels."""
        return int(np.prod(_shape(attention, limits)))

    @classmethod
    def scratch_bytes(cls, attention: Attention, limits: KvLimits, ops: Any) -> int:
        """Bytes of the kernel's scratch."""
        block = _choice(limits).block
        return int(ops.select_scratch_bytes(attention.heads, attention.kv_heads, limits.context, block))

    def __init__(self, attention: Attention, limits: KvLimits, ops: Any, allocate: Allocate) -> None:
        self._choice, self._ops, self._scale = _choice(limits), ops, attention.scale
        self._labels = allocate(_shape(attention, limits), np.uint8)
        self._count = 0  # positions that have labels
        own = self._choice.labels
        self._keys = own.keys.swapaxes(1, 2)[:, None]  # views: copies for every layer would not be planned
        self._queries = own.queries.swapaxes(1, 2)

    def restart(self) -> None:
        """Forget all labels."""
        self._count = 0

    def begin(self, start: int, keys: Callable[[int, int], Array]) -> None:
        """Label what rows from position `start` on may choose.

        `keys` gives those of positions from one up to another, float32 [kv_heads, positions, head_dim].
        """
        self._count = min(self._count, start // LABEL_TOKENS * LABEL_TOKENS)  # the sequence may have been cut back
        while self._count < (end := labelled(start)):
            self._extend(keys(self._count, min(self._count + PIECE, end)))

    def _extend(self, keys: Array) -> None:
        """Label the next positions, float32 [kv_heads, positions, head_dim]."""
        own, (heads, count, dim) = self._choice.labels, keys.shape
        values = (keys.reshape(heads, -1, LABEL_TOKENS, dim) @ self._keys).reshape(heads, count, -1)
        self._ops.label_append(
            np.ascontiguousarray(values.swapaxes(0, 1)), own.low, own.step, self._labels, self._count
        )
        self._count += count

    def leaves_out(self, position: int, heads: slice) -> bool:
        """Whether a row at `position` attends to less than everything before it."""
        choice, every = self._choice, range(*heads.indices(len(self._labels)))
        return any(choice.kept(position, head) < choice.end(position) - 1 for head in every)

    def choose(self, query: Array, positions: Sequence[int], heads: slice, chosen: Array, scratch: Array) -> Array:
        """The heaviest blocks for rows at `positions`, ascending, into `chosen` (int32 [T, kv_heads, most]).

        query: float32 [T, H, head_dim]; heads: the KV heads that these H belong to. Returns how many, int32 [T,
        kv_heads].
        """
        choice, count = self._choice, len(query)
        every = range(*heads.indices(len(self._labels)))
        grouped = query.reshape(count, len(every), -1, query.shape[-1])
        labels = (grouped @ self._queries[heads]).reshape(count, query.shape[1], -1)
        ends = np.asarray([choice.end(position) for position in positions], np.int32)
        keep = np.asarray([[choice.kept(position, head) for head in every] for position in positions], np.int32)
        counts = np.empty(keep.shape, np.int32)
        self._ops.select(
            np.ascontiguousarray(labels),
            self._labels[heads],
            choice.labels.step[heads],
            self._scale,
            1,
            ends,
            keep,
            choice.block,
            chosen,
            counts,
            scratch,
        )
        return counts


def _choice(limits: KvLimits) -> Choice:
    assert limits.choice is not None, "a layer without labels has no index"
    return limits.choice


def _shape(attention: Attention, limits: KvLimits) -> tuple[int, ...]:
    return label_shape(attention.kv_heads, limits.context, _choice(limits).labels.step.shape[1])
