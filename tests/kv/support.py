"""Stores of one layer side by side, and labels to choose by."""

from __future__ import annotations

import numpy as np

from flashrt.kv.base import KvRows, KvStore
from flashrt.kv.choice import Choice
from flashrt.labels import KvLabels, LayerLabels
from flashrt.spec import Attention, ModelSpec

Array = np.ndarray
CHANNELS = 8


def random_labels(kv_heads: int, dim: int, seed: int, channels: int = CHANNELS) -> LayerLabels:
    """Labels by random products, whose codes cover what random keys give."""
    random = np.random.default_rng(seed)
    keys = random.normal(size=(kv_heads, channels, dim)).astype(np.float32)
    queries = (keys + 0.1 * random.normal(size=keys.shape)).astype(np.float32)
    spread = 2.2 * np.linalg.norm(keys, axis=2)
    return LayerLabels(keys, queries, (-spread).astype(np.float32), (spread / 7.5).astype(np.float32))


def spec_labels(spec: ModelSpec, block: int = 4) -> KvLabels:
    """Labels for every layer without a window."""
    attentions = [layer.attention for layer in spec.layers]
    layers = tuple(
        None if a.window is not None else random_labels(a.kv_heads, a.head_dim, i) for i, a in enumerate(attentions)
    )
    shares = tuple((1.0,) * a.kv_heads for a in attentions)
    return KvLabels("", block, layers, shares)


def random_rows(attention: Attention, rows: int, seed: int) -> tuple[Array, Array, Array]:
    """Queries, keys and values, float32 [rows, heads, head_dim]."""
    random = np.random.default_rng(seed)
    shape = rows, attention.heads + 2 * attention.kv_heads, attention.head_dim
    qkv = random.normal(size=shape).astype(np.float32)
    return tuple(np.split(qkv, [attention.heads, attention.heads + attention.kv_heads], 1))  # type: ignore[return-value]


def attended(store: KvStore, attention: Attention, query: Array, rows: KvRows) -> Array:
    """What attention gives, float32 [rows, heads * head_dim]."""
    out = np.full((len(query), attention.heads * attention.head_dim), np.nan, np.float32)
    store.attend(query, rows, slice(0, attention.kv_heads), out)
    assert np.isfinite(out).all()
    return out


def choice_of(attention: Attention, keep: float, block: int, seed: int = 5) -> Choice:
    """A choice that keeps the same share for all KV heads but the last, which keeps half more."""
    shares = (*(keep,) * (attention.kv_heads - 1), 1.5 * keep)
    return Choice(random_labels(attention.kv_heads, attention.head_dim, seed), block, shares)
