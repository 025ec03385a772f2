"""What a block may leave out by channel, fitted to samples of its input.

Of each choice two things are known in the end: the bytes that a token touches, and the error of the block's output. The
choices of all blocks are then weighed against each other (`flashrt.calibration.allocation`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashrt.sparsity import ChannelSparsity
from flashrt.spec import Ffn
from flashrt.storage.atomic import disk_errors, replacing
from flashrt_kernels.channels import (
    CHANNELS,
    Int4Parts,
    encode_channels,
    group_bytes,
    padded_columns,
    take_apart,
)
from flashrt_kernels.curves import function
from flashrt_kernels.ops import Ops
from flashrt_kernels.rows import Codec, row_bytes

# Shares of the channels that take part at all, and whole; each pair costs less than the one before.
CHANNEL_SHARES = (
    (1.0, 1.0),
    (1.0, 0.8),
    (0.97, 0.65),
    (0.95, 0.55),
    (0.92, 0.47),
    (0.9, 0.4),
    (0.86, 0.35),
    (0.82, 0.3),
    (0.77, 0.26),
    (0.7, 0.22),
    (0.62, 0.18),
    (0.45, 0.12),
)
NEURON_SHARES = (1.0, 0.85, 0.75, 0.65, 0.57, 0.5, 0.43, 0.36, 0.3, 0.24, 0.18, 0.12, 0.07, 0.04, 0.02)
FINE_CHANNELS = (32, 24, 20, 16)  # of a group that may be stored whole
FINE_ROOM = 1.1  # by which they must exceed those that take part whole
PROBE_SHARE = 0.55  # of the bytes of a part: the choice by which blocks are weighed, far enough from nothing
PROBE_TOKENS = 64  # samples on which the errors of choices are measured
WEIGH_NEURONS = 1024  # decoded at a time
SLOPE_STEP = 1e-2

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Choice:
    """Thresholds, the bytes of a block that a token touches under them, and its output's mean squared error.

    `stored` are the bytes of the block that have to be kept for it, `fine` the channels of a group stored whole.
    """

    thresholds: tuple[float, ...]
    nbytes: float
    error: float
    stored: int
    fine: int = CHANNELS

    def cost(self, stored: float) -> float:
        """Bytes touched, and bytes stored, of which each is worth `stored` of the former."""
        return self.nbytes + stored * self.stored


@dataclass(frozen=True, slots=True)
class ChannelFit:
    """What calibration found out about one block."""

    order: Array  # int32 [places]: the channel at each place, those beyond the input last in their group
    norms: Array  # float32 [hidden]
    down_norms: Array  # float32 [neurons]
    channels: list[Choice]
    neurons: list[Choice]

    @property
    def parts(self) -> tuple[list[Choice], list[Choice]]:
        return self.channels, self.neurons

    @property
    def strong(self) -> tuple[Choice, Choice]:
        return _strong(self.channels), _strong(self.neurons)

    @property
    def whole(self) -> ChannelSparsity:
        return self.sparsity(tuple(choices[0] for choices in self.parts))

    def sparsity(self, picked: tuple[Choice, ...]) -> ChannelSparsity:
        channels, neurons = picked
        return ChannelSparsity(channels.fine, *channels.thresholds, *neurons.thresholds)

    def figures(self, picked: tuple[Choice, ...]) -> dict[str, float]:
        return {"stored_whole": picked[0].fine / CHANNELS}

    def save(self, path: Path) -> None:
        """Write a file that is there whole or not at all."""
        choices = {name: [asdict(choice) for choice in getattr(self, name)] for name in ("channels", "neurons")}
        arrays: dict[str, Any] = {"order": self.order, "norms": self.norms, "down_norms": self.down_norms}
        with disk_errors(path.parent), replacing(path) as file:
            np.savez(file, choices=json.dumps(choices), **arrays)

    @classmethod
    def load(cls, path: Path) -> ChannelFit:
        with np.load(path) as saved:
            choices = {name: list(map(choice_from, given)) for name, given in json.loads(str(saved["choices"])).items()}
            return cls(saved["order"], saved["norms"], saved["down_norms"], **choices)


def _strong(choices: Sequence[Choice]) -> Choice:
    return min(choices, key=lambda choice: (abs(choice.nbytes - PROBE_SHARE * choices[0].nbytes), choice.error))


def choice_from(data: dict[str, Any]) -> Choice:
    """The inverse of `asdict`."""
    return Choice(**data | {"thresholds": tuple(data["thresholds"])})


class ChannelBlock:
    """One dense block's weights, taken from its bundles uint8 [neurons, stride] in int4."""

    def __init__(self, ffn: Ffn, hidden: int, bundles: Array) -> None:
        self.ffn, self.hidden = ffn, hidden
        size = row_bytes(Codec.INT4, hidden)
        self.rows = [bundles[: ffn.neurons, r * size : (r + 1) * size] for r in range(ffn.bundle_rows)]
        self.columns = padded_columns(ffn.neurons) * (ffn.bundle_rows - 1)

    @property
    def down(self) -> Array:
        return self.rows[-1]

    def parts(self) -> list[Int4Parts]:
        """Gate and up, or up alone."""
        return [take_apart(rows, self.hidden) for rows in self.rows[:-1]]


@dataclass(frozen=True, slots=True)
class Inputs:
    """Inputs of one block, float32 [n, hidden], and what an error of 1 in its output counts for each, float32 [n].

    An error counts by the residual stream that it is added to. Without that, a few tokens with activations a thousand
    times larger than the others' (Sun et al., arXiv:2402.17762) would decide everything.
    """

    x: Array
    weights: Array

    def some(self, count: int) -> Inputs:
        """`count` of them, or all, spread evenly."""
        chosen = np.linspace(0, len(self.x) - 1, min(count, len(self.x))).astype(int)
        return Inputs(self.x[chosen], self.weights[chosen])

    def error(self, found: Array, exact: Array) -> float:
        squares = ((found - exact).astype(np.float64) ** 2).sum(1)
        return float((squares * self.weights).mean())


def fit_channels(block: ChannelBlock, samples: Inputs, up_bias: Array | None, kernels: Ops[Array]) -> ChannelFit:
    """Fit one block to samples of its input. All of them count."""
    natural = np.arange(len(block.parts()[0].codes[0]), dtype=np.int32)
    trial = _ChannelTrial(block, natural, np.ones(block.hidden, np.float32), up_bias, kernels)
    norms, down_norms = _norms(block, trial, samples, kernels)
    order = _hottest_first(norms**2 * (samples.x**2 * samples.weights[:, None]).mean(0))
    probe, counts = samples.some(PROBE_TOKENS), np.abs(samples.x) * norms
    trial = _ChannelTrial(block, order, norms, up_bias, kernels)
    channels = _channel_choices(trial, probe, counts)
    neurons = _neuron_choices(trial, probe, down_norms)
    return ChannelFit(order, norms, down_norms, channels, neurons)


class _ChannelTrial:
    """A block stored whole, computed with any thresholds."""

    def __init__(
        self, block: ChannelBlock, order: Array, norms: Array, up_bias: Array | None, kernels: Ops[Array]
    ) -> None:
        self.block, self.norms, self.up_bias, self.kernels = block, norms, up_bias, kernels
        self.groups, self.vectors = encode_channels(block.parts(), order, CHANNELS)
        self.order = np.where(order < block.hidden, order, -1).astype(np.int32)

    def sums(
        self, x: Array, fine: int = CHANNELS, coarse_from: float = -1.0, fine_from: float = -1.0
    ) -> tuple[Array, float]:
        """Gate and up of x as if `fine` channels of a group were stored whole; the bytes a token touches on average."""
        out = np.zeros((len(x), self.block.columns), np.float32)
        halves = self.kernels.gate_up(
            x, self.groups, 0, fine, self.order, self.norms, self.vectors.ratio, out, coarse_from, fine_from
        )
        fixed = 2 * self.block.columns * len(self.groups)
        return out, sum(halves) / len(x) * self.block.columns / 4 + fixed

    def output(self, sums: Array, norms: Array, neurons_from: float = -1.0) -> tuple[Array, float]:
        """The block's output, and the bytes of rows of down that a token touches on average."""
        ffn, down = self.block.ffn, self.block.down
        y = np.zeros((len(sums), self.block.hidden), np.float32)
        kept = self.kernels.down(
            sums, self.vectors.scale, norms, ffn.activation, ffn.gated, self.up_bias, down, Codec.INT4, 0, y,
            neurons_from,
        )  # fmt: skip
        return y, kept / len(sums) * down.shape[1]

    def projections(self, x: Array) -> list[Array]:
        """Gate and up of x, or up with its bias: float32 [n, neurons] each."""
        sums = np.zeros((len(x), self.block.columns), np.float32)
        self.kernels.gemm_gate_up(x, self.groups, 0, CHANNELS, self.order, self.vectors.ratio, sums)
        sums *= self.vectors.scale
        each = self.block.columns // (len(self.block.rows) - 1)
        parts = [sums[:, i : i + self.block.ffn.neurons] for i in range(0, self.block.columns, each)]
        if self.up_bias is not None:
            parts[0] = parts[0] + self.up_bias
        return parts


def _norms(block: ChannelBlock, trial: _ChannelTrial, samples: Inputs, kernels: Ops[Array]) -> tuple[Array, Array]:
    """What a unit of each channel's x, and of each neuron's h, does to the output, to first order: root mean squares.

    A channel's weights count as much as the neurons they feed: by the slope of h and the length of the row of down.
    """
    act = function(block.ffn.activation)
    neurons, hidden = block.ffn.neurons, block.hidden
    sensitivities = np.zeros((len(block.rows) - 1, neurons))
    for begin in range(0, len(samples.x), PROBE_TOKENS):
        parts = trial.projections(samples.x[begin : begin + PROBE_TOKENS])
        weights = samples.weights[begin : begin + PROBE_TOKENS]
        slope = (act(parts[0] + SLOPE_STEP) - act(parts[0] - SLOPE_STEP)) / (2 * SLOPE_STEP)
        if block.ffn.gated:
            sensitivities[0] += weights @ (slope * parts[1]) ** 2
            sensitivities[1] += weights @ act(parts[0]) ** 2
        else:
            sensitivities[0] += weights @ slope**2
    down_norms = np.empty(neurons, np.float32)
    squares = np.zeros(hidden)
    for begin in range(0, neurons, WEIGH_NEURONS):
        some = slice(begin, min(begin + WEIGH_NEURONS, neurons))
        weights = np.empty((some.stop - some.start, hidden), np.float32)
        kernels.dequantize(block.down[some], Codec.INT4, hidden, weights)
        down_norms[some] = np.sqrt((weights**2).sum(1))
        for rows, sensitivity in zip(block.rows[:-1], sensitivities, strict=True):
            kernels.dequantize(rows[some], Codec.INT4, hidden, weights)
            squares += (sensitivity[some] / len(samples.x) * down_norms[some] ** 2) @ weights**2
    # A channel that no sample shows to matter still must not be worth nothing.
    return np.sqrt(np.maximum(squares, squares.mean() * 1e-6)).astype(np.float32), down_norms


def _hottest_first(energy: Array) -> Array:
    """Channels by falling energy within each group, the places beyond the input last."""
    places = -(-len(energy) // 64) * 64
    padded = np.full(places, -1.0)
    padded[: len(energy)] = energy
    ranks = np.argsort(-padded.reshape(-1, CHANNELS), axis=1, kind="stable")
    return (ranks + np.arange(0, places, CHANNELS)[:, None]).reshape(-1).astype(np.int32)


def _channel_choices(trial: _ChannelTrial, probe: Inputs, counts: Array) -> list[Choice]:
    """All pairs of shares, with all numbers of channels stored whole that leave room for them."""
    ones = np.ones(trial.block.ffn.neurons, np.float32)
    exact, _ = trial.output(trial.sums(probe.x)[0], ones)
    choices = []
    for shares in CHANNEL_SHARES:
        thresholds = tuple(_threshold(counts, share) for share in shares)
        for fine in FINE_CHANNELS:
            if fine < CHANNELS and fine < FINE_ROOM * shares[1] * CHANNELS:
                continue
            sums, nbytes = trial.sums(probe.x, fine, *thresholds)
            error = probe.error(trial.output(sums, ones)[0], exact)
            stored = len(trial.groups) * group_bytes(trial.block.columns, fine)
            choices.append(Choice(thresholds, nbytes, error, stored, fine))
    return choices


def _neuron_choices(trial: _ChannelTrial, probe: Inputs, norms: Array) -> list[Choice]:
    act = function(trial.block.ffn.activation)
    parts = trial.projections(probe.x)
    h = act(parts[0]) * parts[1] if trial.block.ffn.gated else act(parts[0])
    counts = np.abs(h) * norms
    sums, _ = trial.sums(probe.x)
    exact, _ = trial.output(sums, norms)
    choices = []
    for share in NEURON_SHARES:
        threshold = _threshold(counts, share)
        found, nbytes = trial.output(sums, norms, threshold)
        choices.append(Choice((threshold,), nbytes, probe.error(found, exact), trial.block.down.nbytes))
    return choices


def _threshold(counts: Array, share: float) -> float:
    """What `share` of all counts reach; below 0 for all of them."""
    return -1.0 if share >= 1 else float(np.quantile(counts, 1 - share))


def cheapest(choices: Sequence[Choice], price: float, stored: float) -> Choice:
    """The choice that costs the least: bytes touched and stored, and `price` for an error of one."""
    return min(choices, key=lambda choice: choice.cost(stored) + price * choice.error)
