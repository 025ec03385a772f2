"""Labels of keys: moments beside numpy's, projections of a known subspace, rotations, and the ranges of codes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flashrt.calibration.kv_fit import BINS, SPREAD, Ranges, Rotations, best_range, project, projections
from flashrt.calibration.kv_moments import Moments
from flashrt.rope import Rope
from flashrt.spec import Attention
from flashrt_kernels import ops

HEADS, KV_HEADS, DIM = 6, 2, 20
ATTENTION = Attention(HEADS, KV_HEADS, DIM, DIM**-0.5)
ROPED = Attention(HEADS, KV_HEADS, DIM, DIM**-0.5, Rope(1000.0, "yarn", 4.0, 64, attention_factor=1.2))


def draw(seed: int, tokens: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Queries and keys that are neither centred nor alike in all directions."""
    rng = np.random.default_rng(seed)
    queries = rng.standard_normal((tokens, HEADS, DIM)) @ rng.standard_normal((DIM, DIM)) + 0.5
    keys = rng.standard_normal((tokens, KV_HEADS, DIM)) @ rng.standard_normal((DIM, DIM)) - 0.7
    return queries.astype(np.float32), keys.astype(np.float32)


def moments_of(queries: np.ndarray, keys: np.ndarray) -> Moments:
    moments = Moments(HEADS // KV_HEADS, KV_HEADS, DIM)
    for begin in range(0, len(keys), 37):
        moments.add(queries[begin : begin + 37], keys[begin : begin + 37])
    return moments


def test_moments_are_those_of_all_positions(tmp_path: Path) -> None:
    queries, keys = draw(1)
    moments_of(queries, keys).save(tmp_path / "moments.npz")
    moments = Moments.load(tmp_path / "moments.npz")
    assert moments.count == 300
    for head in range(KV_HEADS):
        own = queries[:, 3 * head : 3 * head + 3].reshape(-1, DIM).astype(np.float64)
        key = keys[:, head].astype(np.float64)
        found = moments.means(head)
        for mean, expected in zip(found, (own.T @ own / 900, key.T @ key / 300, key.mean(0)), strict=True):
            np.testing.assert_allclose(mean, expected, rtol=1e-12, atol=1e-12)


def test_projections_find_the_subspace_that_matters() -> None:
    """Queries see 5 of 20 directions only: 5 numbers tell q · k exactly, whatever keys do in the others."""
    rng = np.random.default_rng(2)
    basis = np.linalg.qr(rng.standard_normal((DIM, DIM)))[0]
    queries = rng.standard_normal((400, 5)) * [3, 1, 1, 0.5, 0.2] @ basis[:, :5].T
    keys = rng.standard_normal((500, DIM)) * np.linspace(9, 0.5, DIM) @ rng.standard_normal((DIM, DIM))
    of_keys, of_queries = project(queries.T @ queries / 400, np.cov(keys.T), 8)
    exact = queries @ keys.T
    np.testing.assert_allclose((queries @ of_queries.T) @ (of_keys @ keys.T), exact, atol=1e-4 * np.abs(exact).max())
    np.testing.assert_allclose(np.cov((keys @ of_keys.T).T)[:5, :5], np.eye(5), atol=1e-6)


def test_no_channels_do_better_than_the_projections() -> None:
    queries, keys = (part[:, 0].astype(np.float64) for part in draw(3, 2000))
    of_keys, of_queries = project(queries.T @ queries / 2000, np.cov(keys.T), 8)
    keys = keys - keys.mean(0)
    exact = queries @ keys.T
    error = np.mean(((queries @ of_queries.T) @ (of_keys @ keys.T) - exact) ** 2)
    best = np.argsort(-(queries**2).mean(0) * keys.var(0))[:8]
    assert error < 0.7 * np.mean((queries[:, best] @ keys[:, best].T - exact) ** 2)


@pytest.mark.parametrize("first", [0.0, 0.75])
def test_moments_are_averaged_over_rotations(first: float) -> None:
    rotations = Rotations(ROPED, 256)
    keys = draw(4, 50)[1].astype(np.float64)
    moment = keys[:, 0].T @ keys[:, 0] / 50
    positions = np.linspace(256 * first, 256, 2048)
    turned = [
        rotations.turned(keys[:, :1], np.full(50, position), 256)[:, 0].astype(np.float64) for position in positions
    ]
    expected = np.mean([part.T @ part / 50 for part in turned], axis=0)
    np.testing.assert_allclose(rotations.moment(moment, first), expected, rtol=1e-4, atol=1e-4)
    if first == 0:
        np.testing.assert_allclose(rotations.mean(keys[:, 0].mean(0)), np.mean(turned, (0, 1)), rtol=1e-3, atol=1e-4)


def test_what_turns_is_what_the_model_turns() -> None:
    keys = draw(5, 40)[1]
    positions = np.arange(7, 47)
    angles = positions[:, None] * np.asarray(ROPED.rope.inverse_frequencies(DIM))  # type: ignore[union-attr]
    expected = keys.copy()
    ops.load("cpu").rope(expected, *((1.2 * part(angles)).astype(np.float32) for part in (np.cos, np.sin)))
    np.testing.assert_allclose(Rotations(ROPED, 256).turned(keys, positions, 256), expected, rtol=1e-4, atol=1e-5)


def test_labels_go_on_beyond_the_text() -> None:
    """Fitted to moments of one position, labels tell scores at others, unlike those of keys as they stood there."""
    attention = Attention(HEADS, KV_HEADS, DIM, DIM**-0.5, Rope(1000.0))
    queries, keys = draw(6, 400)
    rotations = Rotations(attention, 2048)
    moments = moments_of(queries, keys)
    of_keys, of_queries, _ = projections(moments, rotations, 8)
    here = project(moments.queries[0] / 1200, np.cov(keys[:, 0].T), 8)
    late = np.full(400, 2000)
    q, k = rotations.turned(queries, late, 2048)[:, 0], rotations.turned(keys, np.arange(1000, 1400), 2048)[:, 0]
    k = k - k.mean(0)
    errors = [np.mean((q @ b.T @ (a @ k.T) - q @ k.T) ** 2) for a, b in ((of_keys[0], of_queries[0]), here)]
    assert errors[0] < 0.7 * errors[1]


def test_every_key_counts_in_the_ranges() -> None:
    queries, keys = draw(7)
    of_keys, _, means = projections(moments_of(queries, keys), Rotations(ATTENTION, 256), 8)
    ranges = Ranges(of_keys, means)
    for begin in range(0, 300, 41):
        ranges.add(keys[begin : begin + 41])
    assert (ranges.counts.sum(-1) == 300).all()
    labels = ranges.labels(of_keys)
    values = np.einsum("tkd,krd->tkr", keys, of_keys)
    codes = np.clip(np.rint((values - labels.low) / labels.step), 0, 15)
    error = ((labels.low + codes * labels.step - values) ** 2).mean(0) / values.var(0)
    assert (error < 0.02).all(), "16 codes of normal values leave an error of 1.2%"


def test_a_range_leaves_out_what_is_rare() -> None:
    """A value far away widens the range of all; the best range gives it up."""
    values = np.random.default_rng(8).standard_normal(20000)
    values[0] = 11
    counts = np.histogram(values, BINS, (-SPREAD, SPREAD))[0]
    low, step = best_range(counts)
    assert -3.2 < low < -2.2
    assert 2.2 < low + 15 * step < 3.2
    assert best_range(np.zeros(BINS, np.int64))[1] > 0
    one = np.zeros(BINS, np.int64)
    one[40] = 3
    assert best_range(one)[1] > 0


def test_a_context_turns_by_its_own_frequencies() -> None:
    """Long contexts may have other frequencies (longrope): labels are fitted to the rotations of each."""
    factors = tuple(np.linspace(1, 8, DIM // 2).tolist())
    rope = Rope(1000.0, "longrope", original_context=4096, short_factors=(1.0,) * (DIM // 2), long_factors=factors)
    rotations = Rotations(Attention(HEADS, KV_HEADS, DIM, 1.0, rope), 8192)
    keys = draw(9, 64)[1]
    numbers = np.arange(5, 69)
    found = rotations.scattered(keys, 5)
    for length in (4096, 8192):
        own = np.flatnonzero(numbers % 2 == (length == 8192))
        positions = np.floor(length * (numbers[own] * (5**0.5 - 1) / 2 % 1.0))
        angles = positions[:, None] * np.asarray(rope.inverse_frequencies(DIM, length))
        expected = keys[own].copy()
        ops.load("cpu").rope(expected, np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))
        np.testing.assert_allclose(found[own], expected, rtol=1e-3, atol=1e-3)
