"""Fits of attention heads: what they give is predicted better than by its mean, and choices tell their true errors."""

from __future__ import annotations

import numpy as np
import pytest

from flashrt.calibration import fit_heads as fitting
from flashrt.calibration.fit_channels import Inputs
from flashrt.calibration.fit_heads import EVERYTHING, SHARES, Attended, HeadFit, fit_heads
from flashrt.calibration.fit_predictor import held_out
from flashrt.model.predictors.heads import HeadPredictor
from flashrt.model.predictors.low_rank import encode
from flashrt_kernels import cpu

HEADS, DIM, HIDDEN, TOKENS, QUERY_BYTES = 7, 24, 72, 1100, 3000

Array = np.ndarray


def samples(seed: int) -> tuple[Inputs, Attended]:
    """Heads whose sums of values are as long as a random function of the input says, and of a random direction."""
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((TOKENS, HIDDEN)).astype(np.float32)
    lengths = np.exp(x @ draw.standard_normal((HIDDEN, HEADS)) * HIDDEN**-0.5 + draw.standard_normal(HEADS))
    values = draw.standard_normal((TOKENS, HEADS, DIM)) * lengths[:, :, None]
    out = draw.standard_normal((HIDDEN, HEADS * DIM)).astype(np.float32)
    weights = draw.random(TOKENS, np.float32) + 0.1
    return Inputs(x, weights), Attended(values.reshape(TOKENS, -1).astype(np.float32), out, HEADS)


@pytest.fixture(scope="module")
def fitted() -> HeadFit:
    return fit_heads(*samples(0), QUERY_BYTES, cpu)


def scores(fit: HeadFit, x: Array) -> Array:
    return HeadPredictor(cpu, encode(cpu, fit.weights), fit.bias).scores(x)


def relative_error(given: Inputs, attended: Attended, chosen: Array) -> float:
    """By the heads that are not chosen, one by one."""
    missing = np.zeros_like(given.x)
    for head in range(HEADS):
        own = slice(head * DIM, (head + 1) * DIM)
        missing += np.where(chosen[:, head, None], 0, attended.values[:, own] @ attended.out[:, own].T)
    return float(((missing**2).sum(1) * given.weights).mean())


def test_scores_are_products_with_the_stored_weights() -> None:
    draw = np.random.default_rng(1)
    weights = draw.standard_normal((HEADS, HIDDEN)).astype(np.float32)
    bias, x = draw.standard_normal(HEADS).astype(np.float32), draw.standard_normal((5, HIDDEN)).astype(np.float32)
    predictor = HeadPredictor(cpu, encode(cpu, weights), bias)
    found, exact = predictor.scores(x), x @ weights.T + bias
    assert found.shape == (5, HEADS)
    assert np.sqrt(np.mean((found - exact) ** 2)) < 0.1 * np.sqrt(np.mean(exact**2))  # 4 bits
    assert np.array_equal(found[3:4], predictor.scores(x[3:4]))


def test_what_heads_add_is_told_apart() -> None:
    _, attended = samples(2)
    tokens = np.array([5, 0, 1099])
    whole = attended.added(tokens, np.ones((3, HEADS), bool))
    assert np.allclose(whole, attended.values[tokens] @ attended.out.T, rtol=1e-5, atol=1e-4)
    lengths = attended.lengths()[tokens]
    for head in range(HEADS):
        alone = attended.added(tokens, np.arange(HEADS)[None].repeat(3, 0) == head)
        assert np.allclose(np.linalg.norm(alone, axis=1), lengths[:, head], rtol=1e-4)
    assert not attended.added(tokens, np.zeros((3, HEADS), bool)).any()


def test_choices_cost_less_and_lose_more(fitted: HeadFit) -> None:
    assert fitted.choices[0].thresholds == (EVERYTHING,)
    assert fitted.choices[0].error == 0
    assert fitted.choices[0].nbytes == HEADS * QUERY_BYTES
    errors = [choice.error for choice in fitted.choices[1:]]
    assert errors == sorted(errors)
    given, _ = samples(0)
    found = scores(fitted, given.x[held_out(TOKENS)])
    for share, choice in zip(SHARES, fitted.choices[1:], strict=True):
        chosen = found > choice.thresholds[0]
        assert chosen.mean() == pytest.approx(share, abs=0.01)
        runs = np.mean([sum(row[head] and not (head and row[head - 1]) for head in range(HEADS)) for row in chosen])
        apart = fitting.SPLIT_BYTES + fitting.RUN_BYTES * runs
        assert choice.nbytes - choice.stored == pytest.approx(apart + chosen.sum(1).mean() * QUERY_BYTES)


def test_errors_are_those_of_tokens_held_out(fitted: HeadFit) -> None:
    given, attended = samples(0)
    held = held_out(TOKENS)
    probe = Inputs(given.x[held], given.weights[held])
    for choice in fitted.choices[1::3]:
        chosen = scores(fitted, probe.x) > choice.thresholds[0]
        rest = Attended(attended.values[held], attended.out, HEADS)
        assert choice.error == pytest.approx(relative_error(probe, rest, chosen), rel=1e-3)


def test_prediction_loses_less_than_leaving_out_the_smallest_on_average() -> None:
    """On text of the same kind; and no choice loses less than knowing everything."""
    given, attended = samples(0)
    fitted = fit_heads(given, attended, QUERY_BYTES, cpu)
    held = held_out(TOKENS)
    importance = np.log(attended.lengths() * np.sqrt(given.weights)[:, None])
    probe, rest = Inputs(given.x[held], given.weights[held]), Attended(attended.values[held], attended.out, HEADS)
    means = np.broadcast_to(importance[~held].mean(0), importance[held].shape)

    def best(ranks: Array) -> float:
        chosen = ranks >= np.quantile(ranks, 1 - fitting.PROBE_SHARE)
        return relative_error(probe, rest, chosen)

    assert best(importance[held]) < fitted.strong.error < 0.7 * best(means)
