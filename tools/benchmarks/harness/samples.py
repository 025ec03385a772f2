"""Samples: dictionaries of labels and figures. Who goes first, and what many samples come to."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

Sample = dict[str, Any]
Spread = dict[str, float]  # median, least, most, count
Title = Sequence[str]  # of a column: a word, or a word and a unit of tools.benchmarks.page
Titles = Mapping[str, Title]  # by key of a sample

T = TypeVar("T")


def in_turn(names: Sequence[T], turn: int) -> list[T]:
    """The names, begun with another one each turn: none always goes first. Two of them make AB, BA, AB."""
    by = turn % max(len(names), 1)
    return [*names[by:], *names[:by]]


def alternate(rounds: int, first: Callable[[], T], second: Callable[[], T]) -> list[tuple[T, T]]:
    """Pairs of what both give; who goes first changes from pair to pair."""
    pairs = []
    for turn in range(rounds):
        found = {call: call() for call in in_turn((first, second), turn)}
        pairs.append((found[first], found[second]))
    return pairs


def timed(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def spread(values: Iterable[float | None]) -> Spread | None:
    """Median and range of the values that there are; None where there are none."""
    found = [value for value in values if value is not None]
    if not found:
        return None
    return {"median": statistics.median(found), "least": min(found), "most": max(found), "count": len(found)}


def median(values: Iterable[float | None]) -> float | None:
    found = spread(values)
    return found["median"] if found else None


def grouped(samples: Iterable[Sample], *labels: str) -> dict[tuple[Any, ...], list[Sample]]:
    """Samples by their values of `labels`, in the order in which these first come."""
    groups: dict[tuple[Any, ...], list[Sample]] = {}
    for sample in samples:
        groups.setdefault(tuple(sample[label] for label in labels), []).append(sample)
    return groups


def only(samples: Iterable[Sample], **labels: Any) -> list[Sample]:
    """The samples that have these values."""
    return [sample for sample in samples if all(sample.get(key) == value for key, value in labels.items())]


def ratios(ours: Iterable[Sample], theirs: Iterable[Sample], figure: str, turn: str = "round") -> list[float]:
    """One figure over another, of samples made in the same turn; turns without both give none."""
    others = {sample[turn]: sample.get(figure) for sample in theirs}
    pairs = ((sample.get(figure), others.get(sample[turn])) for sample in ours)
    return [one / other for one, other in pairs if one and other]


def table(columns: Sequence[Title], rows: Iterable[Sequence[Any]]) -> dict[str, Any]:
    """A table of a record: titles with units, and rows of words, numbers and spreads."""
    titles = [(column, "") if isinstance(column, str) else column for column in columns]
    return {"columns": [{"name": name, "unit": unit} for name, unit in titles], "rows": [list(row) for row in rows]}


def tabulated(samples: Iterable[Sample], labels: Titles, figures: Titles) -> dict[str, Any]:
    """A table with a row for each group of samples, of the spreads of their figures."""
    rows = [
        [*key, *(spread(sample.get(figure) for sample in group) for figure in figures)]
        for key, group in grouped(samples, *labels).items()
    ]
    return table([*labels.values(), *figures.values()], rows)
