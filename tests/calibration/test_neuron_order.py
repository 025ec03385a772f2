"""The order of neurons: a permutation, hot ones first, and those that fire together near each other."""

from __future__ import annotations

import numpy as np

from flashrt.calibration.neuron_order import BANDS, HOT, chain, neuron_order
from flashrt.calibration.samples import Samples
from flashrt.storage import _io
from flashrt.storage.cost import CostCurve

NEURONS, TOPICS = 1200, 40
CURVE = CostCurve({4096: 321e6, 16384: 674e6, 65536: 1414e6, 131072: 1414e6})  # of a disk that was measured


def activity(seed: int, tokens: int) -> np.ndarray:
    """bool [tokens, NEURONS]: every token has two of 40 topics of 30 neurons, scattered; and a few neurons are hot."""
    layout = np.random.default_rng(0).permutation(NEURONS)
    topic, rate = layout % TOPICS, np.where(layout < 60, 0.7, 0.02)
    draw = np.random.default_rng(seed)
    chosen = draw.integers(0, TOPICS, (tokens, 2))
    on_topic = (topic == chosen[:, :1]) | (topic == chosen[:, 1:])
    return draw.random((tokens, NEURONS)) < np.where(on_topic, 0.5, 0) + rate


def samples(active: np.ndarray) -> Samples:
    made = Samples(len(active), 1, np.ones(NEURONS, np.float32))
    made.add(np.zeros((len(active), 1), np.float32), active.astype(np.float32))
    return made


def seconds(active: np.ndarray, order: np.ndarray, pinned: int, stride: int = 2560) -> float:
    """What reading the neurons that are not pinned costs, token by token."""
    table, total = CURVE.table(32), 0.0
    for token in active[:, order]:
        rows = pinned + np.flatnonzero(token[pinned:])
        for first, last in _io.spans(rows * stride, stride, table):
            pages = -(-(rows[last - 1] + 1) * stride // 4096) - rows[first] * stride // 4096
            total += CURVE.seconds(4096 * int(pages))
    return total


def test_a_permutation_and_always_the_same() -> None:
    active = activity(1, 700)
    order = neuron_order(samples(active))
    assert order.dtype == np.int32
    assert sorted(order.tolist()) == list(range(NEURONS))
    assert np.array_equal(order, neuron_order(samples(active)))


def test_hot_neurons_come_first_and_any_prefix_is_hotter_than_the_rest() -> None:
    active = activity(1, 700)
    frequency = active.mean(axis=0)[neuron_order(samples(active))]
    hot = int(HOT * NEURONS)
    assert (np.diff(frequency[:hot]) <= 0).all()
    for cut in (hot, *(hot + int(share * (NEURONS - hot)) for share in BANDS)):
        assert frequency[:cut].min() >= frequency[cut:].max()


def test_reading_other_tokens_costs_less() -> None:
    seen, other = activity(1, 2000), activity(2, 100)
    by_frequency = np.argsort(-seen.mean(axis=0), kind="stable")
    pinned = int(HOT * NEURONS)
    at_random = np.concatenate([by_frequency[:pinned], np.random.default_rng(3).permutation(by_frequency[pinned:])])
    cost = [seconds(other, order, pinned) for order in (neuron_order(samples(seen)), by_frequency, at_random)]
    assert cost[0] < 0.8 * min(cost[1:])


def test_a_chain_visits_each_once_and_stays_among_alike() -> None:
    groups = np.repeat(np.eye(5, dtype=np.float32), 8, axis=0)
    shuffle = np.random.default_rng(0).permutation(40)
    noise = np.random.default_rng(1).standard_normal((40, 5)).astype(np.float32) * 0.05
    order = chain(groups[shuffle] + noise)
    assert sorted(order.tolist()) == list(range(40))
    assert order[0] == 0
    visited = (shuffle // 8)[order]
    assert np.count_nonzero(np.diff(visited)) == 4


def test_neurons_that_never_fire_come_last() -> None:
    active = activity(1, 700)
    active[:, 100:700] = False
    assert set(neuron_order(samples(active))[-500:].tolist()) <= set(range(100, 700))
