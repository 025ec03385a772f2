"""The beginning of one sequence copied to another, where all that is kept of it lies position by position."""

from __future__ import annotations

from flashrt.kv.base import LayerStore
from flashrt.kv.cache import KvCache
from flashrt.kv.contiguous import ContiguousStore
from flashrt.kv.shared import SharedStore


def copies(cache: KvCache) -> bool:
    """Whether the beginning of such a sequence can be copied: no window has slid over it, and no state moved on."""
    return all(type(store) in (ContiguousStore, SharedStore) for store in cache.stores)


def copy_prefix(source: KvCache, target: KvCache, length: int) -> None:
    """Begin `target` again with what the first `length` tokens of `source` have; `KvCache.restored` makes it hold them.

    For caches of which `copies` is true.
    """
    if length > source.length:
        raise ValueError(f"{length} tokens were to be copied of a sequence of {source.length}")
    target.restart([0] * len(target.stores))
    for theirs, ours in zip(source.stores, target.stores, strict=True):
        _copy(theirs, ours, length)


def _copy(source: LayerStore, target: LayerStore, length: int) -> None:
    if isinstance(source, ContiguousStore) and isinstance(target, ContiguousStore):
        target.memory[:, :length] = source.memory[:, :length]
