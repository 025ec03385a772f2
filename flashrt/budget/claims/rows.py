"""Memory of single neurons: what a cache of a layer's rows takes, and how a budget is divided among the layers.

A layer has pinned rows, which calibration ordered hot first, and slots for rows that recent tokens needed. A window of
a few tokens holds most of what the next one needs (LLM in a Flash, section 3.2), so windows come first, and what they
leave pins rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flashrt.budget.claims.base import Case, Claim
from flashrt.budget.owners import prefix_bytes
from flashrt.budget.plan import TierPlan
from flashrt.sparsity import RowSparsity
from flashrt.storage.layout import PAGE, TensorLayout
from flashrt_kernels.limits import NEURON_STEP

QUEUE_FACTOR = 4  # entries of the queue for each slot of the window: most are outdated when it has to be compacted
WINDOW_TOKENS = 4  # whose neurons a window holds, where there is room; more are better pinned


def least_slots(neurons: int, pinned: int) -> int:
    """Slots without which a cache of a layer with `pinned` of its `neurons` pinned cannot work."""
    return pinned + min(NEURON_STEP, neurons - pinned)


def index_bytes(neurons: int, slots: int, pinned: int) -> int:
    """Bytes that a cache keeps beside its slots."""
    return 4 * neurons + 4 + 10 * slots + 4 * QUEUE_FACTOR * (slots - pinned)


def predictor_work_bytes(neurons: int, rank: int, hidden: int) -> int:
    """Bytes that a predictor of one token at a time keeps beside its matrices, and those of guesses at its input."""
    return 4 * rank + (3 * 4 + 1) * neurons + 3 * 4 * hidden


@dataclass(frozen=True, slots=True)
class RowMemory:
    """The FFN of one layer, and what calibration knows about its rows."""

    tensor: TensorLayout
    sparsity: RowSparsity

    @property
    def least(self) -> int:
        """Slots of the smallest window."""
        return least_slots(self.tensor.run_bundles, 0)

    @property
    def wanted(self) -> int:
        """Slots of a window that holds a few tokens' neurons."""
        return min(max(int(WINDOW_TOKENS * self.sparsity.misses[0]), self.least), self.tensor.run_bundles)

    @property
    def index_bytes(self) -> int:
        """The most that an index may take."""
        neurons = self.tensor.run_bundles
        return index_bytes(neurons, neurons, 0)

    def room(self, pinned_bytes: int) -> int:
        """Slots that a window can use beside pinned rows."""
        return max(self.tensor.run_bundles - pinned_bytes // self.tensor.stride, 0)

    def missed(self, pinned_bytes: int, window: int) -> float:
        """Rows that a token reads, by what was seen on calibration text."""
        held = min(pinned_bytes // self.tensor.stride, self.tensor.run_bundles) + window
        return self.sparsity.missed(held / self.tensor.run_bundles)

    def read_bytes(self, rows: float) -> int:
        """Bytes that come from the disk for so many rows: the rest of their pages too, but never more than all."""
        return min(int(rows * (self.tensor.stride + PAGE)), self.tensor.nbytes)


def divide_windows(layers: list[RowMemory], pinned_bytes: Mapping[str, int], free: int) -> dict[str, int]:
    """Slots of every layer's window, together at most `free` bytes: each its least, the rest by its tokens' neurons.

    Layers that can use less than their share leave it to the others.
    """
    windows = {layer.tensor.name: min(layer.least, layer.room(pinned_bytes[layer.tensor.name])) for layer in layers}
    free -= sum(windows[layer.tensor.name] * layer.tensor.stride for layer in layers)
    weights = {layer.tensor.name: max(layer.sparsity.misses[0], 1.0) * layer.tensor.stride for layer in layers}
    left = sum(weights.values())

    def want(layer: RowMemory) -> int:
        name = layer.tensor.name
        return (layer.room(pinned_bytes[name]) - windows[name]) * layer.tensor.stride

    for layer in sorted(layers, key=lambda layer: want(layer) / weights[layer.tensor.name]):
        name, stride = layer.tensor.name, layer.tensor.stride
        more = max(min(want(layer), int(free * weights[name] / left)), 0) // stride
        windows[name] += more
        free -= more * stride
        left -= weights[name]
    return windows


@dataclass(frozen=True)
class RowTier(TierPlan):
    """Windows of the layers that are not pinned whole: `slots` for a row each."""

    def to_json(self) -> dict[str, Any]:
        return {"row_reads_per_token": self.scattered_reads, "row_window_slots": sum(self.slots.values())}


class RowClaim(Claim):
    """The claim of packs calibrated by row: predictors first, then windows, and pinned rows in what these leave."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        tensors = case.layout.tensors
        self._layers = [RowMemory(tensors[f"{i}.ffn"], rows) for i, rows in enumerate(case.layout.rows)]

    @property
    def whole(self) -> list[TensorLayout]:
        """Predictors."""
        return self.case.tensors("predictors")

    def fixed(self) -> dict[str, int]:
        hidden = self.case.spec.hidden
        work = sum(predictor_work_bytes(r.tensor.run_bundles, r.sparsity.rank, hidden) for r in self._layers)
        return {"predictors": work + sum(t.nbytes for t in self.whole)} if self._layers else {}

    def moving(self) -> dict[str, int]:
        return {"row index": sum(r.index_bytes for r in self._layers)} if self._layers else {}

    def least(self) -> int:
        return sum(r.least * r.tensor.stride for r in self._layers)

    def wanted(self, free: int, ring: bool) -> int:
        """Bytes of windows that are worth more than pinned rows."""
        if sum(r.tensor.nbytes for r in self._layers) <= free:
            return 0
        return min(sum(r.wanted * r.tensor.stride for r in self._layers), free)

    def grant(self, free: int, pinned: Mapping[str, int], ring: bool) -> RowTier:
        held = {r.tensor.name: prefix_bytes(r.tensor, pinned[r.tensor.name]) for r in self._layers}
        parts = [r for r in self._layers if pinned[r.tensor.name] < r.tensor.blocks]
        windows = divide_windows(parts, held, free)
        missed = {r.tensor.name: r.missed(held[r.tensor.name], windows.get(r.tensor.name, 0)) for r in self._layers}
        return RowTier(
            nbytes=sum(r.tensor.stride * windows[r.tensor.name] for r in parts),
            slots=windows,
            reads={r.tensor.name: r.read_bytes(missed[r.tensor.name]) for r in self._layers},
            scattered_reads=sum(missed.values()),
        )
