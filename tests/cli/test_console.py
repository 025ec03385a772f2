"""Progress in plain lines: how far, how fast, how long it still takes."""

from __future__ import annotations

from typing import Any

import pytest

from flashrt.cli import console
from flashrt.cli.console import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def lines(capsys: Any) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_the_time_left_follows_from_the_rate_so_far(clock: list[float], capsys: Any) -> None:
    with Progress() as progress:
        progress("packing", 100 << 20, 1000 << 20)  # what an earlier run has done tells nothing of the rate
        clock[0] += 10
        progress("packing", 300 << 20, 1000 << 20)
        assert lines(capsys) == ["packing: 30% (300 MiB of 1000 MiB, 21 MB/s, 35.0 s left)"]
        clock[0] += 35
        progress("packing", 1000 << 20, 1000 << 20)
        assert lines(capsys) == ["packing: 100% (1000 MiB of 1000 MiB, 21 MB/s)"]


def test_nothing_is_shown_once_stopped(clock: list[float], capsys: Any) -> None:
    with Progress() as progress:
        progress("loading", 0, 100)
        clock[0] += 10
        progress.stop()
        progress("loading", 50, 100)
    assert lines(capsys) == []
