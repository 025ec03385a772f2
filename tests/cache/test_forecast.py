"""The forecast of experts against plain loops, and as a policy against the ones that it has to beat."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from flashrt.cache.forecast import DECAY, Forecast
from tools.make_synthetic_pack import PRESETS
from tools.research.expert_policies import HABITS, Habit, simulations, synthetic_trace

SHAPE = replace(PRESETS["tiny"], layers=5, experts=9, experts_per_token=3)


def test_tokens_together_count_as_one_by_one() -> None:
    random = np.random.default_rng(0)
    chosen = np.argsort(random.random((40, 9)), axis=1)[:, :3]
    together, single = Forecast(5, 9), Forecast(5, 9)
    sums, weight = np.zeros(9), 1.0
    for begin, count in ((0, 17), (17, 1), (18, 22)):
        together.update(3, chosen[begin : begin + count])
    for row in chosen:
        single.update(3, row[None])
        sums, weight = DECAY * sums, DECAY * weight + 1
        sums[row] += 1
    for forecast in (single, together):
        forecast._repeated = 0.0  # what they know of repetition may differ: frequencies are those of a pass's beginning
        expected = (1 - forecast.stickiness) * sums / weight + forecast.stickiness * np.isin(np.arange(9), chosen[-1])
        assert forecast.probabilities[3] == pytest.approx(expected)
        assert not forecast.probabilities[[0, 1, 2, 4]].any()


@pytest.mark.parametrize(("habit", "low", "high"), [(Habit(0, 0, 0), 0, 0.05), (Habit(0, 0.6, 0), 0.4, 0.65)])
def test_stickiness_is_learned(habit: Habit, low: float, high: float) -> None:
    forecast = Forecast(SHAPE.layers, SHAPE.experts)
    for token in synthetic_trace(SHAPE, habit, 400, np.random.default_rng(1)):
        for layer, chosen in enumerate(token):
            forecast.update(layer, chosen[None])
    assert low <= forecast.stickiness <= high
    assert (forecast.probabilities >= 0).all()
    assert (forecast.probabilities <= 1 + 1e-9).all()


def test_the_layer_that_computes_is_needed_last() -> None:
    forecast = Forecast(4, 9)
    for layer in range(4):
        forecast.update(layer, np.array([[1, 2, 3]]))
    worth = forecast.values(2)[:, 1]
    assert worth[3] > worth[0] > worth[1] > worth[2]


def test_it_is_near_the_better_of_recency_and_frequency_under_every_habit() -> None:
    shape = replace(PRESETS["mixtral-8x7b"], layers=12)
    rates = {sample["habit"]: sample for sample in simulations(shape, slots=25, tokens=200)}
    assert rates.keys() == HABITS.keys()
    for rate in rates.values():
        assert rate["forecast"] > max(rate["LRU"], rate["LFU"]) - 0.03
        assert rate["clairvoyant"] > rate["forecast"]
    assert rates["Zipf 1"]["forecast"] > rates["Zipf 1"]["LRU"] + 0.05
    assert rates["30% kept"]["forecast"] > rates["30% kept"]["LFU"] + 0.05
