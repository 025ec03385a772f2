"""Who goes first, and what samples come to."""

from __future__ import annotations

import pytest

from tools.benchmarks.harness.samples import alternate, grouped, in_turn, only, ratios, spread, table, tabulated, timed


def test_two_take_turns_at_going_first() -> None:
    asked: list[str] = []
    pairs = alternate(4, lambda: asked.append("a") or 1.0, lambda: asked.append("b") or 2.0)
    assert asked == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert pairs == [(1.0, 2.0)] * 4


def test_each_goes_first_as_often() -> None:
    assert [in_turn("abc", turn) for turn in range(4)] == [list("abc"), list("bca"), list("cab"), list("abc")]
    assert in_turn([], 3) == []


def test_a_spread_is_of_what_there_is() -> None:
    assert spread([5.0, None, 1.0, 2.0]) == {"median": 2.0, "least": 1.0, "most": 5.0, "count": 3}
    assert spread([1.0, 2.0, None])["median"] == 1.5
    assert spread([None]) is None


def test_ratios_are_of_the_same_turn() -> None:
    ours = [{"round": 0, "speed": 10.0}, {"round": 1, "speed": 2.0}, {"round": 2, "speed": 8.0}]
    theirs = [{"round": 2, "speed": 1.0}, {"round": 0, "speed": 5.0}, {"round": 1}, {"round": 3, "speed": 1.0}]
    assert ratios(ours, theirs, "speed") == [2.0, 8.0]
    assert ratios(ours, [{"round": 0, "speed": None}], "speed") == []


def test_a_table_has_a_row_for_each_group() -> None:
    samples = [
        {"cap": "1", "kind": "a", "speed": 3.0},
        {"cap": "none", "kind": "a", "speed": 9.0},
        {"cap": "1", "kind": "a", "speed": 5.0},
        {"cap": "1", "kind": "b", "failed": "killed"},
    ]
    assert list(grouped(samples, "cap", "kind")) == [("1", "a"), ("none", "a"), ("1", "b")]
    assert only(samples, cap="1", kind="a") == [samples[0], samples[2]]
    found = tabulated(samples, {"cap": ("memory", "budget"), "kind": "kind"}, {"speed": ("tokens/s", "number")})
    assert found["columns"] == table([("memory", "budget"), "kind", ("tokens/s", "number")], [])["columns"]
    assert found["rows"][0] == ["1", "a", {"median": 4.0, "least": 3.0, "most": 5.0, "count": 2}]
    assert found["rows"][2] == ["1", "b", None]


def test_a_call_is_timed() -> None:
    assert timed(lambda: sum(range(1000))) > 0
    with pytest.raises(ZeroDivisionError):
        timed(lambda: 1 / 0)
