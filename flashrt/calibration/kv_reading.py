"""What the heads of a model do while it reads text: their moments, the ranges of labels, what choosing costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import numpy as np

from flashrt.budget.planner import CHUNKS
from flashrt.calibration.kv_errors import Errors, Rows, measure, measure_bytes
from flashrt.calibration.kv_fit import BINS, Ranges, Rotations
from flashrt.calibration.kv_moments import Moments
from flashrt.calibration.kv_shares import KEEPS
from flashrt.calibration.windows import Windows
from flashrt.engine.engine import Engine
from flashrt.kv.numbers import keys_of, values_of
from flashrt.labels import LayerLabels, most_channels
from flashrt.model.attention import HeadObserver
from flashrt.spec import Attention
from flashrt_kernels.limits import ATTENTION_SEGMENT

BLOCK = 8  # positions chosen together: single ones gave a fifth less error, and would be eight times the reads
SAMPLED = 64  # rows of a window held out, in its second half
PASS_ROWS = CHUNKS[0]  # of a pass, whose queries and keys are turned and summed in float64

Array = np.ndarray
Progress = Callable[[str, int, int], None]  # what is going on, done, in all


class Reading:
    """Reads windows with `engine`, and looks at some layers' heads."""

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
            with self._engine.runner.decoder.mixers.attention.observing(sampled.observe):
                self._engine.runner.prefill(self._engine.sequence, window)
            for i, own in labels.items():
                queries = rotations[i].turned(np.concatenate(sampled.queries[i]), positions, self._engine.plan.context)
                rows = Rows(positions, queries, partial(self._stored, i, len(window)), self._sinks(i))
                parts[i].append(measure(self._attentions[i], own, rows, BLOCK, KEEPS))
            self._engine.sequence.rewind(0)
            self._progress("errors", done + 1, len(windows))
        return {i: Errors.joined(own) for i, own in parts.items()}

    def _read(self, stage: str, windows: Windows, observe: HeadObserver) -> None:
        with self._engine.runner.decoder.mixers.attention.observing(observe):
            for done, window in enumerate(windows):
                self._engine.runner.prefill(self._engine.sequence, window)
                self._engine.sequence.rewind(0)
                self._progress(stage, done + 1, len(windows))

    def _sinks(self, i: int) -> Array | None:
        """Those of a layer's heads, where it has them."""
        weights = self._engine.runner.decoder.weights
        return np.asarray(weights.vector(f"{i}.sinks")) if self._attentions[i].sinks else None

    def _stored(self, i: int, count: int, head: int) -> tuple[Array, Array]:
        """Keys and values of the first positions of a KV head, float32 [count, head_dim]."""
        store, dim = self._engine.sequence.kv.keys_of(i), self._attentions[i].head_dim
        found = np.empty((2, count, dim), np.float32)
        codec, ops = self._engine.plan.kv_codec, self._engine.runner.decoder.work.ops
        for begin in range(0, count, ATTENTION_SEGMENT):
            page = np.empty((1, min(ATTENTION_SEGMENT, count - begin), *codec.pair(dim)), codec.dtype)
            store.read_page(begin, slice(head, head + 1), page)
            for to, part in zip(found, (keys_of, values_of), strict=True):
                to[begin : begin + page.shape[1]] = part(ops, page, dim)[0]
        return found[0], found[1]


def reading_bytes(attentions: Iterable[Attention], length: int) -> int:
    """Bytes that reading windows of `length` tokens takes beside what the engine does: about, and at most."""
    every = list(attentions)
    moments = sum(16 * own.kv_heads * own.head_dim**2 for own in every)
    ranges = sum(8 * own.kv_heads * (most_channels(own) or 0) * BINS for own in every)
    labels = sum(8 * own.kv_heads * (most_channels(own) or 0) * own.head_dim for own in every)
    sampled = sum(4 * SAMPLED * own.heads * own.head_dim for own in every)
    measured = max(measure_bytes(own, length) for own in every)
    passed = max(PASS_ROWS * own.head_dim * (32 * own.kv_heads + 16 * own.heads // own.kv_heads) for own in every)
    return max(moments + passed, ranges + labels + passed, sampled + labels + measured)


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
