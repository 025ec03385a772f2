"""Attention to chosen tokens: labels of keys, the choice of blocks by them, and attention over lists."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

import flashrt_kernels.cpu._cpu as _cpu

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Ints = NDArray[np.int32]


def label_append(values: Floats, low: Floats, step: Floats, labels: Bytes, position: int) -> None:
    """Encodes values [n, KVH, r] into labels (`flashrt_kernels.labels`) of positions `position` and following.

    A code is (value - low) / step, rounded to nearest, ties to even, within 0 to 15 (0 for what is not a number). low
    and step [KVH, r], r a multiple of 8; values may have a stride in the first dimension.
    """
    _cpu.label_append(values, low, step, labels, position)


def select(
    q: Floats,
    labels: Bytes,
    step: Floats,
    scale: float,
    first: int,
    ends: Ints,
    keep: Ints,
    block: int,
    chosen: Ints,
    counts: Ints,
    scratch: Bytes | None = None,
) -> None:
    """The heaviest blocks of tokens of each row and KV head, ascending, into chosen [T, KVH, most].

    q [T, H, r] of labels, with a stride allowed in the first dimension; step [KVH, r] of labels; scale > 0. Candidates
    of row t are blocks `first` to ends[t] - 1, of `block` tokens (a divisor of 16) each. Row t and head h keep
    keep[t, h] of them, or all that there are; counts [T, KVH] says how many that is. ends [T], keep [T, KVH].

    A query times `step` is rounded to 8 bits a channel; its score of a token is scale times the exact product with the
    codes. A block weighs the softmax of the scores over the candidates' tokens, summed over its tokens and the queries
    that share the KV head. Of blocks that weigh the same, earlier ones go first. A row's choice depends neither on
    other rows nor on threads. scratch uint8 [select_scratch_bytes(...)]; None allocates.
    """
    _cpu.select(q, labels, step, scale, first, ends, keep, block, chosen, counts, scratch)


def select_scratch_bytes(heads: int, kv_heads: int, context: int, block: int) -> int:
    """Scratch of `select` on labels of `context` positions, for any number of rows."""
    return int(_cpu.select_scratch_bytes(heads, kv_heads, context, block))


def attention_list(
    q: Floats,
    near: NDArray[Any],
    far: NDArray[Any] | None,
    lists: Ints,
    counts: Ints,
    scale: float,
    softcap: float | None,
    out: Floats,
    scratch: Bytes | None = None,
    sinks: Floats | None = None,
) -> None:
    """Attention of each row and KV head over the tokens of a list of its own, lists [T, KVH, most], counts [T, KVH].

    q [T, H, D], stride allowed in the first dimension; near [KVH, slots, *pair] and far [tokens, *pair], alike; out
    [T, H * V]. Row t and head h attend to lists[t, h, :counts[t, h]], in that order: i >= 0 is near[h, i], -1 - i is
    far[i]. An empty list gives zeros; 0, 1, .. p gives the bits of `attention` at position p. sinks [H]: see
    `attention`. scratch uint8 [attention_list_scratch_bytes(...)]; None allocates.
    """
    _cpu.attention_list(q, near, far, lists, counts, scale, softcap or 0.0, out, scratch, sinks)


def attention_list_scratch_bytes(tokens: int, heads: int, kv_heads: int, dim: int) -> int:
    """Scratch of `attention_list`, whatever the lists, with the present number of threads."""
    return int(_cpu.attention_list_scratch_bytes(tokens, heads, kv_heads, dim))
