"""Costs of reads and the merging of rows by them."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashrt.storage import _io
from flashrt.storage.cost import CostCurve
from flashrt.storage.layout import PAGE

LIMIT = 16  # pages of a read at most

rates = st.dictionaries(st.sampled_from([PAGE << i for i in range(11)]), st.floats(1e6, 1e10), min_size=1)
offsets = st.lists(st.integers(0, 200 * PAGE), max_size=40).map(sorted)
row_sizes = st.one_of(st.integers(1, 3 * PAGE), st.integers(1, 20 * PAGE))


def spans(starts: Iterable[int], row_bytes: int, costs: list[float]) -> list[tuple[int, int]]:
    return _io.spans(np.array(list(starts), np.int64), row_bytes, costs)


def pages(starts: list[int], row_bytes: int, first: int, last: int) -> int:
    return -(-(starts[last - 1] + row_bytes) // PAGE) - starts[first] // PAGE


def test_the_points_are_on_the_curve_and_between_them_it_is_straight_on_logarithmic_scales() -> None:
    curve = CostCurve({PAGE: 1e8, 16 * PAGE: 1e9, 64 * PAGE: 1e9})
    assert curve.seconds(PAGE) == pytest.approx(PAGE / 1e8)
    assert curve.seconds(16 * PAGE) == pytest.approx(16 * PAGE / 1e9)
    assert curve.seconds(4 * PAGE) == pytest.approx((curve.seconds(PAGE) * curve.seconds(16 * PAGE)) ** 0.5)
    assert curve.seconds(128 * PAGE) == pytest.approx(128 * PAGE / 1e9)
    assert curve.seconds(1) == curve.seconds(PAGE)
    assert curve.table(3) == [curve.seconds(n * PAGE) for n in (1, 2, 3)]


@given(rates)
@settings(deadline=None)
def test_noise_neither_punishes_nor_rewards_a_larger_read(measured: dict[int, float]) -> None:
    costs = CostCurve(measured).table(64)
    for one, two in itertools.pairwise(costs):
        assert two >= one * (1 - 1e-9)
    for a, b in itertools.combinations(range(1, 32), 2):
        assert costs[a + b - 1] <= (costs[a - 1] + costs[b - 1]) * (1 + 1e-9)


@given(offsets, row_sizes, rates)
@settings(deadline=None, max_examples=300)
def test_a_cut_holds_every_row_and_none_is_cheaper(
    starts: list[int], row_bytes: int, measured: dict[int, float]
) -> None:
    costs = CostCurve(measured).table(LIMIT)
    cut = spans(starts, row_bytes, costs)
    assert [i for first, last in cut for i in range(first, last)] == list(range(len(starts)))

    def cost(first: int, last: int) -> float:
        count = pages(starts, row_bytes, first, last)
        return costs[count - 1] if count <= LIMIT else costs[-1] * count / LIMIT

    best = [0.0]  # of the first n rows, by trying everything
    for n in range(1, len(starts) + 1):
        fitting = {m for m in range(n) if pages(starts, row_bytes, m, n) <= LIMIT} | {n - 1}
        best.append(min(best[m] + cost(m, n) for m in fitting))
    assert sum(cost(*span) for span in cut) == pytest.approx(best[-1])
    assert sum(cost(*span) for span in cut) <= sum(cost(i, i + 1) for i in range(len(starts))) * (1 + 1e-9)


def test_rows_are_merged_across_a_gap_when_the_gap_costs_less_than_another_read() -> None:
    costs = [10.0 + n for n in range(1, 33)]  # a read costs as much as ten pages
    assert spans([0, 9 * PAGE], 100, costs) == [(0, 2)]
    assert spans([0, 10 * PAGE], 100, costs) == [(0, 2)]
    assert spans([0, 12 * PAGE], 100, costs) == [(0, 1), (1, 2)]
    assert spans([0, 9 * PAGE], 100, []) == [(0, 1), (1, 2)]
    assert spans([], 100, costs) == []


def test_a_read_has_a_largest_size() -> None:
    costs = [10.0 + n for n in range(1, 5)]
    assert spans([n * PAGE for n in range(10)], PAGE, costs) == [(0, 4), (4, 8), (8, 10)]
    assert spans([0, PAGE, 20 * PAGE], 8 * PAGE, costs) == [(0, 1), (1, 2), (2, 3)]


@pytest.mark.parametrize("portable", [True, False])
def test_checksums_are_those_of_zlib(portable: bool) -> None:
    data = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8)
    for size in [*range(200), 4096, 5000]:
        assert _io.crc32(data[:size], portable) == zlib.crc32(data[:size])
