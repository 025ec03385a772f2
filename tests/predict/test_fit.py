"""Fitting: what is learnt holds on other text, and every sample counts."""

from __future__ import annotations

import numpy as np
import pytest

from flashrt.errors import UsageError
from flashrt.predict import fit as fitting
from flashrt.predict.fit import closed_form, fit, refine
from flashrt.predict.low_rank import Factors, LowRank, encode
from flashrt_kernels import cpu
from tests.predict.quality import Quality, measure
from tests.predict.support import ReluLayer, relu_layer, text

TOKENS = 1500


def fitted(layer: ReluLayer, x: np.ndarray, rank: int = 12, recall: float = 0.95) -> Factors:
    return fit(layer.samples(x), layer.weights, layer.bias, rank, recall)


def judged(layer: ReluLayer, factors: Factors) -> Quality:
    rank = len(factors.down)
    predictor = LowRank(cpu, encode(cpu, factors.down), encode(cpu, factors.up), factors.bias, rank, 1)
    return measure(predictor, layer.samples(text(99, 300)), np.arange(300))


@pytest.mark.parametrize("recall", [0.8, 0.95, 0.99])
def test_the_recall_asked_for_holds_on_other_text(recall: float) -> None:
    layer = relu_layer()
    quality = judged(layer, fitted(layer, text(0, TOKENS), recall=recall))
    assert abs(quality.recall - recall) < 0.03
    assert quality.precision > 2 * quality.active
    assert quality.predicted < 0.6


def test_a_larger_rank_predicts_fewer() -> None:
    layer, x = relu_layer(), text(0, TOKENS)
    predicted = [judged(layer, fitted(layer, x, rank)).predicted for rank in (2, 6, 20)]
    assert predicted[0] > 1.2 * predicted[1] > 1.44 * predicted[2]


def test_full_rank_is_exact_to_begin_with() -> None:
    layer, x = relu_layer(neurons=100), text(0, 600)
    factors = closed_form(x, layer.weights, layer.bias, 72)
    exact = x @ layer.weights.T + layer.bias
    scores = x @ factors.down.T @ factors.up.T + factors.bias
    clear = np.abs(exact) > 1e-3 * np.abs(exact).max()
    assert np.array_equal((scores > 0)[clear], (exact > 0)[clear])


def test_the_closed_form_is_the_best_of_its_rank() -> None:
    """Against the textbook: an SVD of W S^(1/2), by way of an exact square root."""
    layer, x = relu_layer(neurons=90), text(0, 700)
    rank, mean = 5, x.mean(axis=0)
    covariance = np.cov(x.T.astype(np.float64), bias=True)
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(values) @ vectors.T
    least = (np.linalg.svd(layer.weights @ root)[1][rank:] ** 2).sum()
    factors = closed_form(x, layer.weights, layer.bias, rank)
    scale = np.linalg.norm(factors.up, axis=1)  # rows are scaled one by one, each to be a logit
    exact, scores = (x - mean) @ layer.weights.T, (x - mean) @ factors.down.T @ factors.up.T
    best = (exact * scores).sum(axis=0) / (scores**2).sum(axis=0)
    error = np.square(exact - best * scores).sum() / len(x)
    assert scale.std() > 0
    assert error == pytest.approx(least, rel=0.01)


def test_refining_lowers_the_loss() -> None:
    layer, x = relu_layer(), text(0, TOKENS)
    samples, every = layer.samples(x), np.arange(TOKENS)
    weight = samples.importance(every) / fitting._typical_importance(samples, every)

    def loss(factors: Factors) -> float:
        scores = x @ factors.down.T @ factors.up.T + factors.bias
        return float(np.where(weight > 0, weight * np.logaddexp(0, -scores), np.logaddexp(0, scores)).mean())

    start = closed_form(x, layer.weights, layer.bias, 6)
    assert loss(refine(start, samples, every)) < 0.95 * loss(start)


def test_the_slope_is_that_of_the_loss() -> None:
    draw = np.random.default_rng(0)
    scores = draw.standard_normal((3, 5)) * 4
    weight = np.maximum(draw.standard_normal((3, 5)), 0)

    def loss(values: np.ndarray) -> float:
        return float(np.where(weight > 0, weight * np.logaddexp(0, -values), np.logaddexp(0, values)).sum() / 3)

    slope = fitting._slope(scores.copy(), weight)
    for place in np.ndindex(3, 5):
        step = np.zeros((3, 5))
        step[place] = 1e-5
        assert slope[place] == pytest.approx((loss(scores + step) - loss(scores - step)) / 2e-5, rel=1e-4)


@pytest.mark.parametrize("place", [0, 40, 447, 448, 511, 700, 1023, TOKENS - 1])
def test_every_sample_counts(place: int) -> None:
    """One token changed anywhere, those held out included, and the fit is another one."""
    layer, x = relu_layer(neurons=60), text(0, TOKENS)
    before = fitted(layer, x, 4)
    assert _same(before, fitted(layer, x, 4))
    changed = x.copy()
    changed[place] = 3 * text(7, 1)[0]
    assert not _same(before, fitted(layer, changed, 4))
    assert not _same(before, fitted(layer, np.delete(x, place, axis=0), 4))


def test_the_importance_of_every_sample_counts() -> None:
    layer, x = relu_layer(neurons=60), text(0, TOKENS)
    before = fitted(layer, x, 4)
    for begin in range(0, TOKENS, 100):
        samples = layer.samples(x)
        samples._importance[begin : begin + 100] = np.roll(samples._importance[begin : begin + 100], 1, axis=1)
        assert not _same(before, fit(samples, layer.weights, layer.bias, 4, 0.95))


def test_a_missed_neuron_weighs_what_it_contributes() -> None:
    """Neurons with long down rows are found more surely than the others."""
    layer, x = relu_layer(), text(0, TOKENS)
    norms = np.where(np.arange(300) < 150, 20, 0.05).astype(np.float32)
    heavy = ReluLayer(layer.weights, layer.bias, norms)
    factors = fitted(heavy, x, 6, 0.9)
    active, found = heavy.h(x) > 0, x @ factors.down.T @ factors.up.T + factors.bias > 0
    share = (active & found).sum(axis=0) / np.maximum(active.sum(axis=0), 1)
    assert share[:150].mean() > share[150:].mean() + 0.2


def test_too_little_text() -> None:
    layer = relu_layer()
    with pytest.raises(UsageError, match="takes 512 tokens at least, found 511"):
        fitted(layer, text(0, 511))


def test_a_layer_that_never_fires() -> None:
    layer, x = relu_layer(), text(0, 600)
    silent = ReluLayer(layer.weights, layer.bias - 1e4, layer.norms)
    with pytest.raises(UsageError, match="no neuron of a layer was active"):
        fitted(silent, x)


def _same(one: Factors, other: Factors) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("down", "up", "bias"))
