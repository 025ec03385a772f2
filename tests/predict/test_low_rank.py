"""The predictors' hot path against plain numpy."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from flashrt.predict.low_rank import CODEC, Factors, LowRank, encode
from flashrt_kernels import cpu
from tests.kernels.helpers import rms_ratio
from tests.predict.oracle import Oracle
from tests.predict.quality import measure
from tests.predict.support import relu_layer, text


def factors(seed: int, neurons: int, rank: int, k: int) -> Factors:
    draw = np.random.default_rng(seed)
    down = draw.standard_normal((rank, k)).astype(np.float32)
    up = draw.standard_normal((neurons, rank)).astype(np.float32)
    return Factors(down, up, draw.standard_normal(neurons).astype(np.float32) * 20)


def low_rank(made: Factors, tokens: int) -> LowRank:
    return LowRank(cpu, encode(cpu, made.down), encode(cpu, made.up), made.bias, len(made.down), tokens)


@pytest.mark.parametrize(("neurons", "rank", "k"), [(9, 1, 65), (203, 13, 72), (1030, 64, 130)])
@pytest.mark.parametrize("tokens", [1, 3])
def test_rows_are_those_with_a_positive_score(neurons: int, rank: int, k: int, tokens: int) -> None:
    made = factors(neurons, neurons, rank, k)
    x = np.random.default_rng(5).standard_normal((tokens, k)).astype(np.float32)
    scores = (x @ made.down.T @ made.up.T + made.bias).max(axis=0)
    found = low_rank(made, 4).predict(x)
    assert found.dtype == np.int32
    assert (np.diff(found) > 0).all()
    chosen = np.zeros(neurons, bool)
    chosen[found] = True
    clear = np.abs(scores) > 0.15 * np.abs(scores).max()  # int4 rows
    assert np.count_nonzero(clear) > 0.5 * neurons
    assert np.array_equal(chosen[clear], scores[clear] > 0)


def test_a_token_finds_the_same_alone_and_in_company() -> None:
    predictor = low_rank(factors(1, 203, 13, 72), 4)
    x = text(3, 4)
    alone = [set(predictor.predict(x[i : i + 1]).tolist()) for i in range(4)]
    assert set(predictor.predict(x).tolist()) == set.union(*alone)
    assert len(set.union(*alone)) > len(alone[0])


def test_encoding_keeps_the_rows() -> None:
    matrix = np.random.default_rng(0).standard_normal((13, 70)).astype(np.float32)
    bundles = encode(cpu, matrix)
    out = np.full((70, 13), np.nan, np.float32)
    for column, unit in enumerate(np.eye(70, dtype=np.float32)):
        cpu.linear(unit[None], bundles, CODEC, out[column : column + 1], 0, 13)
    assert rms_ratio(out.T, matrix) < 0.1


def test_nbytes() -> None:
    made = factors(1, 203, 13, 72)
    bundles = encode(cpu, made.down).nbytes + encode(cpu, made.up).nbytes
    assert made.nbytes == bundles + 4 * 203
    assert low_rank(made, 4).nbytes == made.nbytes + 4 * (4 * 13 + 4 * 203 + 203) + 203


def test_nothing_but_the_answer_is_allocated() -> None:
    predictor, x = low_rank(factors(1, 5000, 64, 72), 2), text(0, 2)
    predictor.predict(x)
    tracemalloc.start()
    rows = predictor.predict(x)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 * len(rows) + 4096  # one of these arrays would be 20 kB


def test_the_oracle_is_exact() -> None:
    layer, x = relu_layer(), text(2, 50)
    samples = layer.samples(x)
    oracle = Oracle(layer.weights, layer.bias)
    quality = measure(oracle, samples, np.arange(50))
    assert (quality.recall, quality.found, quality.precision) == (1, 1, 1)
    assert quality.predicted == quality.active == (layer.h(x) > 0).mean()
    assert 0.02 < quality.active < 0.5
    assert oracle.predict(x).tolist() == np.flatnonzero((layer.h(x) > 0).any(axis=0)).tolist()


def test_quality_of_half_an_answer() -> None:
    layer, x = relu_layer(), text(2, 40)

    class Half:
        nbytes = 0

        def predict(self, hidden: np.ndarray) -> np.ndarray:
            return np.arange(150, dtype=np.int32)

    quality = measure(Half(), layer.samples(x), np.arange(10, 40))
    importance = layer.h(x[10:]) * layer.norms
    assert quality.recall == pytest.approx(importance[:, :150].sum() / importance.sum(), rel=0.01)
    assert quality.found == pytest.approx((importance[:, :150] > 0).sum() / (importance > 0).sum())
    assert quality.precision == pytest.approx((importance[:, :150] > 0).mean())
    assert quality.predicted == 0.5
