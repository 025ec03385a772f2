"""What a block may leave out by neuron, fitted to samples of its input: predictor, thresholds, order.

Of each threshold three things are known in the end: the bytes that a token touches, the error of the block's output,
and how many neurons a token reads from disk, by how much of the block is in memory.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from flashrt.calibration.fit_channels import Choice, Inputs, choice_from
from flashrt.calibration.fit_heads import EVERYTHING, HeadFit
from flashrt.calibration.fit_predictor import fit, held_out, recall_threshold
from flashrt.calibration.neuron_order import neuron_order
from flashrt.calibration.samples import Samples
from flashrt.model.predictors.low_rank import Factors, LowRank, encode
from flashrt.sparsity import RowSparsity
from flashrt.spec import Ffn
from flashrt.storage.atomic import disk_errors, replacing
from flashrt_kernels.curves import function
from flashrt_kernels.ops import Ops
from flashrt_kernels.rows import Codec, row_bytes

RANKS = (64, 128, 256, 512, 1024)  # of predictors, as far as they are smaller than the hidden size
RECALL = 0.98  # of importance, at which predictors are compared by the bytes that a token touches
# Shares of importance that choices keep, beside that of everything; each costs less than the one before.
RECALLS = (0.9999, 0.999, 0.998, 0.995, 0.99, 0.98, 0.97, 0.95, 0.93, 0.9, 0.85, 0.8, 0.7, 0.5)
PROBE_SHARE = 0.9  # the share by which blocks are weighed: what is left out at the others is hard to measure
POINTS = 16  # of the curve of misses, beside that of nothing in memory
CHUNK = 512  # tokens looked at together

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a threshold leaves, on tokens that nothing was fitted to; see `RowSparsity.misses`."""

    recall: float  # of importance
    precision: float  # of the neurons predicted, those active
    misses: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class RowFit:
    """What calibration found out about one block. `outcomes` are those of the choices."""

    order: Array  # int32 [neurons]: the neuron at each place
    factors: Factors  # of neurons in that order
    rows: list[Choice]
    outcomes: list[Outcome]
    heads: HeadFit | None = None  # of the attention before it, where they can be left out

    @property
    def parts(self) -> tuple[list[Choice], ...]:
        return (self.rows,) if self.heads is None else (self.rows, self.heads.choices)

    @property
    def strong(self) -> tuple[Choice, ...]:
        rows = self.rows[1 + RECALLS.index(PROBE_SHARE)]
        return (rows,) if self.heads is None else (rows, self.heads.strong)

    @property
    def whole(self) -> RowSparsity:
        everything = self.sparsity(tuple(choices[0] for choices in self.parts))
        return everything if self.heads is None else replace(everything, heads_from=EVERYTHING)

    def sparsity(self, picked: tuple[Choice, ...]) -> RowSparsity:
        heads_from = None
        if self.heads is not None and picked[1] != self.heads.choices[0]:
            heads_from = picked[1].thresholds[0]
        rank, threshold = len(self.factors.down), picked[0].thresholds[0]
        return RowSparsity(rank, threshold, self._outcome(picked).misses, heads_from)

    def figures(self, picked: tuple[Choice, ...]) -> dict[str, float]:
        """Recall of importance and precision of what the predictor names."""
        outcome = self._outcome(picked)
        return {"recall": outcome.recall, "precision": outcome.precision}

    def _outcome(self, picked: tuple[Choice, ...]) -> Outcome:
        return self.outcomes[self.rows.index(picked[0])]

    def save(self, path: Path) -> None:
        """Write a file that is there whole or not at all."""
        noted = {"rows": [asdict(c) for c in self.rows], "outcomes": [asdict(o) for o in self.outcomes]}
        arrays: dict[str, Any] = asdict(self.factors) | {"order": self.order}
        if self.heads is not None:
            noted["heads"] = [asdict(c) for c in self.heads.choices]
            arrays |= {"head_weights": self.heads.weights, "head_bias": self.heads.bias}
        with disk_errors(path.parent), replacing(path) as file:
            np.savez(file, noted=json.dumps(noted), **arrays)

    @classmethod
    def load(cls, path: Path) -> RowFit:
        with np.load(path) as saved:
            noted = json.loads(str(saved["noted"]))
            rows = list(map(choice_from, noted["rows"]))
            outcomes = [Outcome(o["recall"], o["precision"], tuple(o["misses"])) for o in noted["outcomes"]]
            heads = None
            if "heads" in noted:
                choices = list(map(choice_from, noted["heads"]))
                heads = HeadFit(saved["head_weights"], saved["head_bias"], choices)
            return cls(saved["order"], Factors(saved["down"], saved["up"], saved["bias"]), rows, outcomes, heads)


class Neurons:
    """One dense block's weights as float32, from its bundles uint8 [neurons, stride]."""

    def __init__(
        self, ffn: Ffn, hidden: int, codec: Codec, bundles: Array, up_bias: Array | None, kernels: Ops[Array]
    ) -> None:
        self.ffn, self.stride = ffn, bundles.shape[1]
        self.bias = up_bias
        size, self.rows = row_bytes(codec, hidden), []
        for r in range(ffn.bundle_rows):
            weights = np.empty((ffn.neurons, hidden), np.float32)
            kernels.dequantize(bundles[: ffn.neurons, r * size : (r + 1) * size], codec, hidden, weights)
            self.rows.append(weights)

    @property
    def deciding(self) -> Array:
        """The rows whose products say whether a neuron is zero, float32 [neurons, hidden]."""
        return self.rows[0]

    @property
    def down(self) -> Array:
        return self.rows[-1]

    def h(self, x: Array) -> Array:
        """Activations float32 [n, neurons] of inputs [n, hidden]."""
        decided = x @ self.deciding.T
        act = function(self.ffn.activation)
        if self.ffn.gated:
            return act(decided) * (x @ self.rows[1].T)
        return act(decided if self.bias is None else decided + self.bias)


def fit_rows(neurons: Neurons, given: Inputs, kernels: Ops[Array]) -> RowFit:
    """Fit one block to samples of its input. All of them count, by the residual stream that they are added to."""
    samples = Samples(len(given.x), given.x.shape[1], np.linalg.norm(neurons.down, axis=1))
    for begin in range(0, len(given.x), CHUNK):
        part = slice(begin, begin + CHUNK)
        samples.add(given.x[part], neurons.h(given.x[part]) * np.sqrt(given.weights[part])[:, None])
    order = neuron_order(samples)
    held = np.flatnonzero(held_out(samples.count))
    best: _RowTrial | None = None
    for rank in ranks(given.x.shape[1]):
        factors = fit(samples, neurons.deciding, neurons.bias, rank, RECALL)
        trial = _RowTrial(neurons, factors, samples, held, kernels)
        if best is not None and trial.touched(0.0) >= best.touched(0.0):
            break
        best = trial
    assert best is not None
    thresholds = [EVERYTHING, *(best.threshold(recall) for recall in RECALLS)]
    probe = Inputs(given.x[held], given.weights[held])
    rows = [Choice((t,), best.touched(t), best.error(t, probe), best.stored) for t in thresholds]
    factors = Factors(best.factors.down, best.factors.up[order], best.factors.bias[order])
    return RowFit(order, factors, rows, [best.outcome(t) for t in thresholds])


def ranks(hidden: int) -> list[int]:
    """Ranks that are worth a trial, the cheapest first."""
    return [rank for rank in RANKS if rank < hidden] or [hidden]


class _RowTrial:
    """A predictor as it will be stored, and its scores for the tokens held out."""

    def __init__(self, neurons: Neurons, factors: Factors, samples: Samples, held: Array, kernels: Ops[Array]) -> None:
        self.neurons, self.factors = neurons, factors
        self.importance = samples.importance(held)
        down, up = encode(kernels, factors.down), encode(kernels, factors.up)
        predictor = LowRank(kernels, down, up, factors.bias, len(factors.down), 1)
        self.scores = np.concatenate([predictor.scores(samples.inputs[t : t + 1]).copy() for t in held])

    @property
    def stored(self) -> int:
        """Bytes of all neurons and the predictor."""
        return self.factors.nbytes + self.neurons.stride * len(self.neurons.down)

    def threshold(self, recall: float) -> float:
        """The largest score that a share `recall` of all importance lies above."""
        active = self.importance > 0
        return recall_threshold(self.scores[active], self.importance[active], recall)

    def touched(self, threshold: float) -> float:
        """Bytes of a token: the predictor, and the neurons that it names."""
        return self.factors.nbytes + self.neurons.stride * float((self.scores > threshold).sum(1).mean())

    def error(self, threshold: float, probe: Inputs) -> float:
        """Mean squared error of the block's output by the neurons that are left out."""
        missing = np.where(self.scores > threshold, 0, self.neurons.h(probe.x))
        found = (missing @ self.neurons.down).astype(np.float32)
        return probe.error(found, np.zeros_like(found))

    def outcome(self, threshold: float) -> Outcome:
        chosen = self.scores > threshold
        recall = float(self.importance[chosen].sum(dtype=np.float64) / self.importance.sum(dtype=np.float64))
        precision = float((self.importance[chosen] > 0).mean()) if chosen.any() else 1.0
        return Outcome(recall, precision, misses(chosen))


def misses(chosen: Array) -> tuple[float, ...]:
    """Neurons that a token reads while 0, 1/POINTS .. 1 of all are kept, those used last, for bool [tokens, neurons].

    By stack distances (Mattson et al. 1970), over the second half of the tokens.
    """
    count, neurons = chosen.shape
    sizes = np.arange(POINTS + 1) * neurons / POINTS
    last = np.full(neurons, -1)
    total = np.zeros(POINTS + 1)
    for token, row in enumerate(chosen):
        asked = last[row]
        if token >= count // 2:
            # Neurons that were used since, those of the same token included.
            distances = neurons - np.searchsorted(np.sort(last), asked, "left")
            total += (distances[:, None] > sizes).sum(0)
        last[row] = token
    result = total / max(count - count // 2, 1)
    result[-1] = 0.0
    return tuple(map(float, result))
