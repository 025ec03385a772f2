"""Gate and up by input channel: the layout, and the kernels against the reference and plain arithmetic."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from flashrt_kernels.channels import (
    CHANNELS,
    ChannelVectors,
    channel_groups,
    decode_channels,
    encode_channels,
    group_bytes,
    padded_columns,
    take_apart,
)
from flashrt_kernels.rows import DTYPES, Codec, align, row_bytes

from .helpers import HALF_GEMM, cpu, empty, normal, reference, rms_ratio, same, tensor, tolerance

SHAPES = [(48, 3), (63, 300), (160, 37), (640, 515)]


@dataclass
class Block:
    """A random gated block of k inputs and n neurons, and its weights as they were encoded, float32."""

    k: int
    n: int
    fine: int
    order: np.ndarray
    groups: np.ndarray
    scale: np.ndarray
    ratio: np.ndarray
    down: np.ndarray
    weights: np.ndarray  # gate and up [k, C] as stored; without fine halves where there are none
    down_weights: np.ndarray  # [n, k]
    norms: np.ndarray
    down_norms: np.ndarray


def encoded(weights):
    rows = np.empty((len(weights), row_bytes(Codec.INT4, weights.shape[1])), np.uint8)
    cpu.quantize(weights, Codec.INT4, rows)
    return rows


def decoded(rows, k):
    out = empty(len(rows), k)
    cpu.dequantize(rows, Codec.INT4, k, out)
    return out


def shuffled(k, rng):
    """A random order within groups; places beyond the input hold -1 once the weights are encoded."""
    places = np.arange(align(k, 64), dtype=np.int32).reshape(-1, CHANNELS)
    return rng.permuted(places, axis=1).reshape(-1)


def block(seed, k, n, fine=32, gated=True):
    rng = np.random.default_rng(seed)
    projections = [encoded(normal(seed + i, n, k) / np.float32(k**0.5)) for i in range(2 if gated else 1)]
    order = shuffled(k, rng)
    groups, vectors = encode_channels([take_apart(rows, k) for rows in projections], order, fine)
    weights = np.zeros((align(k, 64), groups_columns(n, gated)), np.float32)
    weights[order] = decode_channels(groups, vectors, fine)
    down = encoded(normal(seed + 2, n, k) / np.float32(n**0.5))
    return Block(
        k, n, fine, np.where(order < k, order, -1).astype(np.int32), groups, vectors.scale, vectors.ratio, down,
        weights[:k], decoded(down, k), rng.uniform(0.5, 2, k).astype(np.float32),
        rng.uniform(0.5, 2, n).astype(np.float32),
    )  # fmt: skip


def groups_columns(n, gated=True):
    return padded_columns(n) * (2 if gated else 1)


def levels(b, x, coarse_from, fine_from):
    """0, 1 or 2 for each channel of each token."""
    counts = np.abs(x) * b.norms
    has_fine = np.zeros(b.k, bool)
    first = b.order.reshape(-1, CHANNELS)[:, : b.fine].reshape(-1)
    has_fine[first[first >= 0]] = True
    return np.where(counts < coarse_from, 0, np.where((counts < fine_from) | ~has_fine, 1, 2))


def rounded(b, x):
    """x in 8 bits per group, as the kernel takes it."""
    padded = np.zeros((len(x), align(b.k, 64)), np.float32)
    padded[:, : b.k] = x
    groups = padded.reshape(len(x), -1, CHANNELS)
    top = np.abs(groups).max(2, keepdims=True)
    codes = np.round(groups * (np.float32(127) / np.maximum(top, 1e-30)))
    return (codes * (top / np.float32(127))).reshape(len(x), -1)[:, : b.k]


def coarse_weights(b, full):
    """The weights that are read where the fine halves are left out."""
    groups = b.groups[:, : group_bytes(len(b.scale), 0)]
    stored = decode_channels(groups, ChannelVectors(b.scale, b.ratio), 0)
    result = np.zeros_like(full)
    inside = b.order >= 0
    result[b.order[inside]] = stored[inside]
    return result


def expected_sums(b, x, coarse_from, fine_from):
    level = levels(b, x, coarse_from, fine_from)
    kept = rounded(b, np.where(level > 0, x, 0))
    return np.where(level == 2, kept, 0) @ b.weights + np.where(level == 1, kept, 0) @ coarse_weights(b, b.weights)


def gate_up(b, x, coarse_from=-1.0, fine_from=-1.0, cuts=()):
    sums = np.zeros((len(x), len(b.scale)), np.float32)
    edges = [0, *cuts, len(b.groups)]
    counts = [
        cpu.gate_up(x, b.groups[i:j], i, b.fine, b.order, b.norms, b.ratio, sums, coarse_from, fine_from)
        for i, j in itertools.pairwise(edges)
    ]
    return sums, tuple(np.sum(counts, axis=0))


@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_layout_holds_the_rows_code_for_code(k, n):
    rng = np.random.default_rng(0)
    rows = [encoded(normal(i, n, k)) for i in range(2)]
    order = shuffled(k, rng)
    groups, vectors = encode_channels([take_apart(r, k) for r in rows], order, CHANNELS)
    assert groups.shape == (channel_groups(k), group_bytes(2 * padded_columns(n), CHANNELS))
    weights = np.zeros((len(order), 2 * padded_columns(n)), np.float32)
    weights[order] = decode_channels(groups, vectors, CHANNELS)
    for i, r in enumerate(rows):
        first = i * padded_columns(n)
        assert rms_ratio(weights[:k, first : first + n], decoded(r, k).T) < 1e-6
        assert not weights[:, first + n : first + padded_columns(n)].any()


@pytest.mark.parametrize("fine", [0, 8, 19, 32])
@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_gate_up_matches_plain_arithmetic(isa, k, n, fine):
    b = block(1, k, n, fine)
    for tokens in (1, 5, 19):
        x = normal(tokens, tokens, k)
        for coarse_from, fine_from in ((-1, -1), (0.3, 0.9), (0.9, 0.2), (1e9, 1e9)):
            sums, counts = gate_up(b, x, coarse_from, fine_from)
            level = levels(b, x, coarse_from, max(coarse_from, fine_from))
            assert counts == ((level > 0).sum(), (level == 2).sum())
            expected = expected_sums(b, x, coarse_from, fine_from)
            if counts[0]:
                assert rms_ratio(sums * b.scale, expected) < 2e-6
            else:
                assert not sums.any()


@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_gate_up_is_the_same_however_it_is_cut(isa, k, n):
    b, x = block(2, k, n, 20), normal(3, 16, k)
    whole, _ = gate_up(b, x, 0.4, 0.8)
    cut, _ = gate_up(b, x, 0.4, 0.8, cuts=range(1, len(b.groups)))
    assert same(whole, cut)
    for t in (0, 7, 15):
        alone, _ = gate_up(b, x[t : t + 1], 0.4, 0.8)
        assert same(alone[0], whole[t])
    cpu.set_threads(3)
    assert same(gate_up(b, x, 0.4, 0.8)[0], whole)


def lossless(seed, b, tokens):
    """Inputs that 8 bits per group hold exactly, whichever channels take part: each group's largest counts most."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-120, 121, (tokens, align(b.k, 64))).astype(np.float32)
    largest = np.arange(0, b.k, CHANNELS)
    codes[:, largest] = rng.choice([-127, 127], (tokens, len(largest)))
    b.norms[largest] = 2.5
    return np.ldexp(codes[:, : b.k], rng.integers(-9, -5, (tokens, 1)))


def on_torch(*arrays):
    """Copies: what one side writes, the other does not see."""
    return [tensor(a.copy()) if isinstance(a, np.ndarray) else a for a in arrays]


@pytest.mark.parametrize(("gated", "fine"), [(True, 0), (True, 11), (False, 32)])
@pytest.mark.parametrize(("k", "n"), SHAPES[1:3])
def test_gate_up_matches_the_reference(isa, k, n, gated, fine):
    b = block(21, k, n, fine, gated)
    for tokens in (1, 17):
        x, start = lossless(22, b, tokens), normal(23, tokens, len(b.scale))
        for thresholds in ((-1.0, -1.0), (0.2, 0.9), (0.9, 0.2), (1e9, 1e9)):
            sums = start.copy()
            arguments = x, b.groups, 0, b.fine, b.order, b.norms, b.ratio, sums, *thresholds
            expected = on_torch(*arguments)
            counts = reference.gate_up(*expected)
            assert cpu.gate_up(*arguments) == counts
            assert rms_ratio(sums, expected[7]) < 2e-6
            assert (rms_ratio(sums, start) > 1e-3) == (counts[0] > 0)


@pytest.mark.parametrize("fine", [0, 11])
@pytest.mark.parametrize(("k", "n"), SHAPES[1:3])
def test_gemm_gate_up_matches_the_reference(isa, k, n, fine):
    b, x = block(24, k, n, fine), normal(25, 19, k)
    sums = normal(26, 19, len(b.scale))
    for i, j in itertools.pairwise([0, len(b.groups) // 2, len(b.groups)]):
        arguments = x, b.groups[i:j], i, b.fine, b.order, b.ratio, sums
        expected = on_torch(*arguments)
        reference.gemm_gate_up(*expected)
        cpu.gemm_gate_up(*arguments)
        assert rms_ratio(sums, expected[6]) < (2e-6 if isa not in HALF_GEMM else 1e-2)


@pytest.mark.parametrize(
    ("codec", "activation"),
    [*((codec, "silu") for codec in DTYPES), *((Codec.INT4, name) for name in ("gelu_tanh", "gelu", "fatrelu:0.7"))],
)
@pytest.mark.parametrize("gated", [True, False])
def test_down_matches_the_reference(isa, gated, activation, codec):
    k, n, tokens = 95, 571, 5
    rng, columns = np.random.default_rng(27), groups_columns(n, gated)
    rows = np.empty((n, row_bytes(codec, k)), np.uint8)
    cpu.quantize(normal(28, n, k), codec, rows)
    scale, norms = (rng.uniform(0.5, 2, size).astype(np.float32) for size in (columns, n))
    sums, y = normal(29, tokens, columns), normal(30, tokens, k)
    up_bias = None if gated else normal(31, n)
    for first, last in ((0, 512), (512, n)):
        stored = sums, scale, norms, activation, gated, up_bias, rows[first:last], codec, first
        for threshold in (-1.0, 0.8, 1e9):
            before, expected = y.copy(), tensor(y.copy())
            count = reference.down(*on_torch(*stored), expected, threshold)
            assert cpu.down(*stored, y, threshold) == count
            assert rms_ratio(y, expected) < tolerance(codec)
            assert same(y, before) == (count == 0)
        expected = tensor(y.copy())
        reference.gemm_down(*on_torch(*stored), expected)
        cpu.gemm_down(*stored, y)
        assert rms_ratio(y, expected) < (3e-6 if isa not in HALF_GEMM or codec is Codec.F32 else 1e-2)


def test_no_number_takes_part_without_a_fine_half_where_there_is_none(isa):
    """What lies behind the last group's fine halves is no part of it."""
    b, x = block(32, 160, 37, 8), normal(33, 2, 160)
    x[0, b.order.reshape(-1, CHANNELS)[4, 31]] = np.nan
    sums, counts = gate_up(b, x, 0.5, 0.9)
    expected = torch.zeros(sums.shape)
    arguments = on_torch(x, b.groups, 0, b.fine, b.order, b.norms, b.ratio)
    assert counts == reference.gate_up(*arguments, expected, 0.5, 0.9)
    assert np.isnan(sums[0]).all()
    assert np.isfinite(sums[1]).all()


def expected_h(b, sums, activation):
    def act(v):
        return {"silu": lambda: v / (1 + np.exp(-v)), "relu": lambda: np.maximum(v, 0)}[activation]()

    half, full = len(b.scale) // 2, sums.astype(np.float64) * b.scale
    return act(full[:, : b.n]) * full[:, half : half + b.n]


def down(b, sums, y, threshold, activation="silu", step=None):
    total = 0
    for first in range(0, b.n, step or b.n):
        rows = b.down[first : first + (step or b.n)]
        total += cpu.down(
            sums, b.scale, b.down_norms, activation, True, None, rows, Codec.INT4, first, y, threshold
        )  # fmt: skip
    return total


@pytest.mark.parametrize("activation", ["silu", "relu"])
@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_down_takes_the_neurons_that_count(isa, k, n, activation):
    b = block(4, k, n)
    for tokens in (1, 3, 16):
        sums, _ = gate_up(b, normal(5, tokens, k))
        h = expected_h(b, sums, activation)
        for share in (0.4, 0.9, None):  # None: all
            threshold = -1.0 if share is None else float(np.quantile(np.abs(h) * b.down_norms, share)) * 1.0001
            counts = np.abs(h) * b.down_norms >= threshold
            kept = np.where(counts, h, 0)
            y = normal(6, tokens, k)
            expected = y + kept @ b.down_weights
            assert down(b, sums, y, threshold, activation) == counts.sum()
            assert rms_ratio(y, expected) < tolerance(Codec.INT4)


def test_down_is_the_same_however_it_is_cut(isa):
    b = block(7, 160, 1300)
    sums, _ = gate_up(b, normal(8, 5, b.k))
    whole, cut, alone = np.zeros((3, 5, b.k), np.float32)
    down(b, sums, whole, 0.05)
    cpu.set_threads(3)
    down(b, sums, cut, 0.05, step=512)
    assert same(whole, cut)
    down(b, sums[2:3], alone[2:3], 0.05)
    assert same(alone[2], whole[2])


@pytest.mark.parametrize("fine", [0, 12, 32])
@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_wide_passes_match_plain_arithmetic(isa, k, n, fine):
    b, tokens = block(9, k, n, fine), 37
    x = normal(10, tokens, k)
    sums = np.zeros((tokens, len(b.scale)), np.float32)
    cuts = [0, len(b.groups) // 2, len(b.groups)]
    for i, j in itertools.pairwise(cuts):
        cpu.gemm_gate_up(x, b.groups[i:j], i, b.fine, b.order, b.ratio, sums)
    exact = isa not in HALF_GEMM
    weights = b.weights
    assert rms_ratio(sums * b.scale, x.astype(np.float64) @ weights) < (2e-6 if exact else 1e-2)
    y = normal(11, tokens, k)
    expected = y + expected_h(b, sums, "silu") @ b.down_weights
    for first in range(0, n, 512):
        rows = b.down[first : first + 512]
        cpu.gemm_down(sums, b.scale, b.down_norms, "silu", True, None, rows, Codec.INT4, first, y)
    assert rms_ratio(y, expected) < (3e-6 if exact else 1e-2)


def test_what_is_not_a_number_shows(isa):
    b, x = block(12, 160, 37), normal(13, 1, 160)
    x[0, 5] = np.nan
    sums, _ = gate_up(b, x, 0.5, 0.5)
    assert np.isnan(sums).any()
    y = np.zeros((1, 160), np.float32)
    down(b, sums, y, 0.5)
    assert np.isnan(y).any()


def test_wrong_arguments_are_named():
    b, x = block(14, 96, 40), normal(15, 2, 96)
    with pytest.raises(ValueError, match="^groups"):
        cpu.gate_up(x, b.groups[:, :-64], 0, b.fine, b.order, b.norms, b.ratio, np.zeros((2, 512), np.float32), 0, 0)
    with pytest.raises(ValueError, match="^first"):
        cpu.gate_up(x, b.groups, 1, b.fine, b.order, b.norms, b.ratio, np.zeros((2, 512), np.float32), 0, 0)
    wrong = b.order + np.int32(50)
    with pytest.raises(ValueError, match="^order"):
        cpu.gate_up(x, b.groups, 0, b.fine, wrong, b.norms, b.ratio, np.zeros((2, 512), np.float32), 0, 0)
    with pytest.raises(ValueError, match="^first"):
        cpu.down(
            np.zeros((2, 512), np.float32), b.scale, b.down_norms, "silu", True, None, b.down[:3], Codec.INT4, 5, x, 0
        )  # fmt: skip
    sums = np.zeros((2, 512), np.float32)
    for name, up_bias, rows in (("up_bias", b.down_norms, b.down), ("rows", None, b.down[:, :9])):
        with pytest.raises(ValueError, match=f"^{name}"):
            cpu.down(sums, b.scale, b.down_norms, "silu", True, up_bias, rows, Codec.INT4, 0, x, 0)
