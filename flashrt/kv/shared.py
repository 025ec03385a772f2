"""Nothing: what a layer keeps that attends to the keys and values of an earlier one."""

from __future__ import annotations

from collections.abc import Sequence

from flashrt.kv.base import Allocate, Kernels, KvLimits, LayerStore
from flashrt.spec import Attention


class SharedStore(LayerStore):
    """The place of such a layer in a `KvCache`: its rows are appended by none, and attend to the other layer's store.

    So it can be gone on from wherever that can.
    """

    holds = Attention

    @classmethod
    def claim(cls, attention: Attention, limits: KvLimits) -> int | None:
        return None if attention.kv_from is None else 0

    def __init__(self, attention: Attention, limits: KvLimits, kernels: Kernels, allocate: Allocate) -> None:
        pass

    def commit(self, start: int, path: Sequence[int]) -> None:
        pass

    def restart(self, first: int = 0) -> None:
        pass

    def truncate(self, length: int, top: int) -> int:
        return length
