"""Fits of blocks by row: what they keep, and the curve of what a cache would read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flashrt.calibration.fit_channels import Inputs
from flashrt.calibration.fit_rows import EVERYTHING, POINTS, Neurons, RowFit, fit_rows, misses, ranks
from flashrt.spec import Ffn
from flashrt_kernels import cpu
from flashrt_kernels.rows import Codec, bundle_stride, row_bytes
from tests.calibration.support import relu_layer, text

NEURONS, HIDDEN, TOKENS = 300, 72, 1100


def neurons(seed: int = 0) -> tuple[Neurons, np.ndarray]:
    """An ungated block in float32, and its down rows."""
    layer = relu_layer(seed, NEURONS, HIDDEN)
    down = np.random.default_rng(seed + 1).standard_normal((NEURONS, HIDDEN)).astype(np.float32)
    size = row_bytes(Codec.F32, HIDDEN)
    bundles = np.zeros((NEURONS + 5, bundle_stride(Codec.F32, HIDDEN, 2)), np.uint8)  # some padding
    for r, weights in enumerate((layer.weights, down)):
        encoded = np.empty((NEURONS, size), np.uint8)
        cpu.quantize(weights, Codec.F32, encoded)
        bundles[:NEURONS, r * size : (r + 1) * size] = encoded
    return Neurons(Ffn(NEURONS, "relu", False, True), HIDDEN, Codec.F32, bundles, layer.bias, cpu), down


@pytest.fixture(scope="module")
def fitted() -> RowFit:
    block, _ = neurons()
    x = text(3, TOKENS, HIDDEN)
    return fit_rows(block, Inputs(x, np.ones(TOKENS, np.float32)), cpu)


def test_a_block_is_taken_apart_exactly() -> None:
    block, down = neurons()
    x, layer = text(5, 20, HIDDEN), relu_layer(0, NEURONS, HIDDEN)
    assert np.array_equal(block.down, down)
    assert np.allclose(block.h(x), layer.h(x), atol=1e-5)


def test_choices_cost_less_and_lose_more(fitted: RowFit) -> None:
    bytes_, errors = ([getattr(choice, key) for choice in fitted.rows] for key in ("nbytes", "error"))
    recalls = [outcome.recall for outcome in fitted.outcomes]
    assert bytes_ == sorted(bytes_, reverse=True)
    assert recalls == sorted(recalls, reverse=True)
    assert fitted.rows[0].thresholds == (EVERYTHING,)
    assert errors[0] == 0
    assert recalls[0] == 1
    assert errors[-1] > 10 * errors[3] > 0
    assert recalls[-1] == pytest.approx(0.5, abs=0.02)
    assert fitted.outcomes[-1].precision > 2 * fitted.outcomes[0].precision


def test_neurons_are_ordered_by_frequency_first(fitted: RowFit) -> None:
    active = relu_layer(0, NEURONS, HIDDEN).h(text(3, TOKENS, HIDDEN)) > 0
    assert sorted(fitted.order) == list(range(NEURONS))
    frequency = active.mean(0)[fitted.order]
    assert frequency[:15].min() >= frequency[15:].max()


def test_a_fit_is_saved(fitted: RowFit, tmp_path: Path) -> None:
    fitted.save(tmp_path / "fit.npz")
    found = RowFit.load(tmp_path / "fit.npz")
    assert found.rows == fitted.rows
    assert found.outcomes == fitted.outcomes
    assert np.array_equal(found.order, fitted.order)
    assert np.array_equal(found.factors.up, fitted.factors.up)
    assert found.sparsity((fitted.rows[4],)) == fitted.sparsity((fitted.rows[4],))


def test_ranks_stay_below_the_hidden_size() -> None:
    assert ranks(40) == [40]
    assert ranks(64) == [64]
    assert ranks(256) == [64, 128]


def test_misses_are_those_of_a_cache_that_keeps_what_was_used_last() -> None:
    draw = np.random.default_rng(2)
    chosen = draw.random((60, 96)) < draw.random(96) * 0.4
    found = misses(chosen)
    assert found[0] == chosen[30:].sum(1).mean()
    for point in range(1, POINTS):
        missed = 0
        for token in range(30, 60):
            uses = last_uses(chosen, token)
            for n in np.flatnonzero(chosen[token]):
                # It is still there unless as many as fit, those used by the same token included, were used since.
                distance = sum(use >= uses[n] for use in uses.values()) if n in uses else 96
                missed += distance > 96 * point / POINTS
        assert found[point] == pytest.approx(missed / 30)
    assert found[-1] == 0
    assert list(found) == sorted(found, reverse=True)


def last_uses(chosen: np.ndarray, before: int) -> dict[int, int]:
    """The token that used it last, of each neuron that was used before a token."""
    return {n: int(np.flatnonzero(chosen[:before, n])[-1]) for n in range(96) if chosen[:before, n].any()}
