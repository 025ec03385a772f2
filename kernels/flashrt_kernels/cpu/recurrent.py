"""Gated delta nets on numpy arrays; see `flashrt_kernels.cpu`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

import flashrt_kernels.cpu._cpu as _cpu

Floats = NDArray[np.float32]


def delta_rule(
    x: Floats,
    gates: Floats,
    taps: Floats,
    rate: Floats,
    bias: Floats,
    tiled: bool,
    state: Floats,
    tail: Floats,
    out: Floats,
    advance: int,
    parents: NDArray[np.int32] | None = None,
    scratch: NDArray[np.uint8] | None = None,
) -> None:
    """A gated delta net over rows, the first `advance` of which move its state on; the others leave no trace in it.

    x [N, C] and gates [N, 2 H] are used up, row strides allowed; taps [n, C], rate and bias [H]; state [H, D, V] and
    tail [n - 1, C] contiguous; out [M, H * V] takes the last M rows. Rows follow one another. parents int32
    [N - advance], at most 16, makes those behind `advance` a tree: row b follows row parents[b] < b of them, or with -1
    the last that moved the state. A row's bits depend on what it follows alone, not on how rows are cut into calls.
    scratch uint8 [delta_rule_scratch_bytes(C, n, D)]; None allocates.
    """
    _cpu.delta_rule(x, gates, taps, rate, bias, tiled, state, tail, out, advance, parents, scratch)


def delta_rule_scratch_bytes(channels: int, taps: int, dim: int) -> int:
    """Scratch of `delta_rule`, for any number of rows, with the present number of threads."""
    return int(_cpu.delta_rule_scratch_bytes(channels, taps, dim))


def rms_norm_gated(x: Floats, gate: Floats, weight: Floats, eps: float, out: Floats) -> None:
    """out = x / sqrt(mean(x²) + eps) * weight * silu(gate) over rows of x and gate [N, K]; out may be x."""
    _cpu.rms_norm_gated(x, gate, weight, eps, out)


def sigmoid_gate(x: Floats, gate: Floats) -> None:
    """x *= sigmoid(gate) in place, x and gate [N, K]; row strides allowed."""
    _cpu.sigmoid_gate(x, gate)
