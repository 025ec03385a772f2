"""What choosing costs, beside a loop over rows; and how heads share what is kept."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from flashrt.calibration.kv_errors import Rows, chosen, measure
from flashrt.calibration.kv_shares import SHARES, divide, error_at, is_dense
from flashrt.kv.choice import recent
from flashrt.labels import LayerLabels
from flashrt.spec import Attention

ATTENTION = Attention(6, 2, 12, 12**-0.5)
BLOCK = 4


def rows(seed: int, count: int = 203) -> Rows:
    rng = np.random.default_rng(seed)
    positions = np.array([40, 77, 150, 202])
    queries = rng.standard_normal((len(positions), 6, 12)) * 2
    keys, values = rng.standard_normal((2, 2, count, 12))
    queries, keys, values = (part.astype(np.float32) for part in (queries, keys, values))
    return Rows(positions, queries, lambda head: (keys[head], values[head]))


def test_what_is_chosen_is_what_a_loop_chooses() -> None:
    rng = np.random.default_rng(1)
    positions = np.array([3, 31, 40, 77, 150, 202])
    guesses = rng.standard_normal((len(positions), 3, 203)).astype(np.float32)
    for keep, masks in zip((0.02, 0.1, 1.0), chosen(guesses, positions, BLOCK, (0.02, 0.1, 1.0)), strict=True):
        for row, p in enumerate(positions):
            end = recent(p) // BLOCK
            expected = {*range(min(BLOCK, p + 1)), *range(end * BLOCK, p + 1)}
            candidates = range(1, end)
            scores = guesses[row, :, BLOCK : end * BLOCK].astype(np.float64)
            weights = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
            by_block = {b: weights[:, (b - 1) * BLOCK : b * BLOCK].sum() for b in candidates}
            for b in sorted(candidates, key=lambda b: -by_block[b])[: int(np.ceil(keep * (p + 1) / BLOCK))]:
                expected |= set(range(b * BLOCK, (b + 1) * BLOCK))
            assert set(np.flatnonzero(masks[row])) == expected


def test_errors_fall_to_nothing_where_all_is_kept() -> None:
    own = rows(2)
    eye = np.broadcast_to(np.eye(12, dtype=np.float32)[:8], (2, 8, 12))
    labels = LayerLabels(eye, eye, np.full((2, 8), -3, np.float32), np.full((2, 8), 0.4, np.float32))
    found = measure(ATTENTION, labels, own, BLOCK, (0.05, 0.2, 1.0))
    relative = found.relative(slice(None))
    assert relative.shape == (2, 3)
    assert (relative[:, 0] > relative[:, 1]).all()
    assert (relative[:, 1] > 1e-4).all()
    assert (relative[:, 2] < 1e-12).all()
    keys, values = own.stored(1)
    scores = np.einsum("rgd,nd->rgn", own.queries[:, 3:].astype(np.float64), keys) * ATTENTION.scale
    seen = np.where(np.arange(203) <= own.positions[:, None, None], np.exp(scores), 0)
    exact = (seen / seen.sum(-1, keepdims=True)) @ values
    assert found.squares.sum() > (exact**2).sum() * 1.01, "both KV heads count"


def test_sinks_take_their_share() -> None:
    own = rows(2)
    sinks = np.array([5.0, -1.0, 2.0, 0.5, 4.0, -3.0], np.float32)
    eye = np.broadcast_to(np.eye(12, dtype=np.float32)[:8], (2, 8, 12))
    labels = LayerLabels(eye, eye, np.full((2, 8), -3, np.float32), np.full((2, 8), 0.4, np.float32))
    found = measure(replace(ATTENTION, sinks=True), labels, own._replace(sinks=sinks), BLOCK, (0.1, 1.0))
    assert (found.errors[..., 1] < 1e-12).all()
    errors, squares = np.zeros(found.errors.shape[:2]), 0.0
    for h in range(2):
        keys, values = own.stored(h)
        codes = np.clip(np.rint((keys @ eye[h].T + 3) / 0.4), 0, 15)
        query = own.queries[:, 3 * h : 3 * h + 3].astype(np.float64)
        guesses = (np.einsum("rgd,nd->rgn", query[..., :8] * 0.4, codes) * ATTENTION.scale).astype(np.float32)
        (mask,) = chosen(guesses, own.positions, BLOCK, (0.1,))
        weights = np.exp(np.einsum("rgd,nd->rgn", query, keys) * ATTENTION.scale)
        weights *= np.arange(203) <= own.positions[:, None, None]
        sink = np.exp(sinks[3 * h : 3 * h + 3].astype(np.float64))[:, None]
        exact = weights @ values / (weights.sum(-1, keepdims=True) + sink)
        few = weights * mask[:, None]
        errors[:, h] = ((few @ values / (few.sum(-1, keepdims=True) + sink) - exact) ** 2).sum((1, 2))
        squares += (exact**2).sum()
    assert np.allclose(found.errors[..., 0], errors, rtol=1e-3)
    assert np.isclose(found.squares.sum(), squares, rtol=1e-4)


def test_labels_beat_labels_that_know_nothing() -> None:
    own = rows(3)
    eye = np.broadcast_to(np.eye(12, dtype=np.float32)[:8], (2, 8, 12))
    low, step = np.full((2, 8), -3, np.float32), np.full((2, 8), 0.4, np.float32)
    errors = [
        measure(ATTENTION, LayerLabels(eye, queries, low, step), own, BLOCK, (0.1,)).errors.sum()
        for queries in (eye, -eye)
    ]
    assert errors[0] < 0.6 * errors[1]


def test_shares_go_where_they_are_worth_most() -> None:
    shares = np.asarray(SHARES)
    easy, hard = 0.01 / shares, 1.0 / shares
    errors = [np.stack([easy, hard]), np.stack([easy, easy]), np.stack([hard, easy])]
    found = divide(errors)
    assert [len(layer) for layer in found] == [2, 2, 2]
    assert np.concatenate(found).mean() <= 1
    assert found[0][1] > 1 > found[0][0]
    even = [np.ones(2)] * 3
    assert error_at(errors, found) < 0.8 * error_at(errors, even)


def test_a_layer_that_needs_everything_stays_dense() -> None:
    """All that is worth something to its heads is everything; the others lose little by keeping less."""
    shares = np.asarray(SHARES)
    needy = np.where(shares == SHARES[-1], 0.0, 5.0)
    found = divide([np.stack([needy, needy]), *[np.stack([0.01 / shares] * 2)] * 40])
    assert is_dense(found[0])
    assert not any(is_dense(layer) for layer in found[1:])
    assert np.concatenate(found).mean() <= 1
