"""What the heads of a model do while it reads text: their moments, the ranges of labels, what choosing costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from flashrt.calibration.kv_errors import Errors, Rows, measure
from flashrt.calibration.kv_fit import Ranges, Rotations
from flashrt.calibration.kv_moments import Moments
from flashrt.calibration.kv_shares import KEEPS
from flashrt.calibration.windows import Windows
from flashrt.engine.engine import Engine
from flashrt.kv.contiguous import ContiguousStore
from flashrt.labels import LayerLabels
from flashrt.model.attention import HeadObserver
from flashrt.spec import Attention

BLOCK = 8  # positions chosen together: single ones gave a fifth less error, and would be eight times the reads
SAMPLED = 64  # rows of a window held out, in its second half

Array = np.ndarray
Progress = Callable[[str, int, int], None]  # what is going on, done, in all


class Reading:
    """Reads windows with `engine`, which holds all keys and values of one, and looks at some layers' heads."""

    def __init__(self, engine: Engine, attentions: Mapping[int, Attention], progress: Progress) -> None:
        self._engine, self._attentions, self._progress = engine, attentions, progress

    def moments(self, windows: Windows) -> dict[int, Moments]:
        """Of all positions, by layer."""
        found = {
            i: Moments(own.heads // own.kv_heads, own.kv_heads, own.head_dim) for i, own in self._attentions.items()
        }

        def observe(i: int, queries: Array, keys: Array) -> None:
            if i in found:
                found[i].add(queries, keys)

        self._read("moments", windows, observe)
        return found

    def ranges(self, windows: Windows, ranges: Mapping[int, Ranges], rotations: Mapping[int, Rotations]) -> None:
        """Take in all keys, each at a position of its own in the contexts that labels are for."""
        seen = dict.fromkeys(ranges, 0)

        def observe(i: int, queries: Array, keys: Array) -> None:
            if i in ranges:
                ranges[i].add(rotations[i].scattered(keys, seen[i]))
                seen[i] += len(keys)

        self._read("ranges", windows, observe)

    def errors(
        self, windows: Windows, labels: Mapping[int, LayerLabels], rotations: Mapping[int, Rotations]
    ) -> dict[int, Errors]:
        """Of rows in the second half of each window, by layer, for `KEEPS`."""
        parts: dict[int, list[Errors]] = {i: [] for i in labels}
        for done, window in enumerate(windows):
            positions = np.unique(np.linspace(len(window) // 2, len(window) - 1, SAMPLED).astype(np.int64))
            sampled = _Sampled(positions, labels)
            with self._engine.runner.decoder.attention.observing(sampled.observe):
                self._engine.runner.prefill(self._engine.sequence, window)
            for i, own in labels.items():
                queries = rotations[i].turned(np.concatenate(sampled.queries[i]), positions, self._engine.plan.context)
                keys, values = self._stored(i, len(window))
                rows = Rows(positions, queries, keys, values)
                parts[i].append(measure(self._attentions[i], own, rows, BLOCK, KEEPS))
            self._engine.sequence.rewind(0)
            self._progress("errors", done + 1, len(windows))
        return {i: Errors.joined(own) for i, own in parts.items()}

    def _read(self, stage: str, windows: Windows, observe: HeadObserver) -> None:
        with self._engine.runner.decoder.attention.observing(observe):
            for done, window in enumerate(windows):
                self._engine.runner.prefill(self._engine.sequence, window)
                self._engine.sequence.rewind(0)
                self._progress(stage, done + 1, len(windows))

    def _stored(self, i: int, count: int) -> tuple[Array, Array]:
        """Keys and values of the first positions, float32 [kv_heads, count, head_dim]."""
        store: Any = self._engine.sequence.kv.stores[i]
        assert isinstance(store, ContiguousStore)
        memory = store.memory[:, :count]
        if memory.dtype != np.float32:
            memory = (memory.astype(np.uint32) << 16).view(np.float32)
        return np.ascontiguousarray(memory[:, :, 0]), np.ascontiguousarray(memory[:, :, 1])


class _Sampled:
    """Queries of some positions of a window, by layer; it may be read in several passes."""

    def __init__(self, positions: Array, layers: Mapping[int, object]) -> None:
        self._positions, self._seen = positions, dict.fromkeys(layers, 0)
        self.queries: dict[int, list[Array]] = {i: [] for i in layers}

    def observe(self, i: int, queries: Array, keys: Array) -> None:
        if i not in self._seen:
            return
        begin = self._seen[i]
        own = self._positions[(self._positions >= begin) & (self._positions < begin + len(queries))]
        self.queries[i].append(queries[own - begin].copy())
        self._seen[i] += len(queries)
