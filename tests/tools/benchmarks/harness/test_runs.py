"""Runs in processes of their own."""

from __future__ import annotations

import os
import sys

import pytest

from tools.benchmarks.harness import runs


def program(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_what_a_run_prints_last_is_its_result() -> None:
    found, outcome = runs.confined(program("print('first'); print('{\"a\": 1}')"), "none")
    assert found == {"a": 1}
    assert outcome.peak_rss_bytes > 0


def test_a_failed_run_says_its_last_words() -> None:
    with pytest.raises(runs.RunFailed, match="a run at 0.5 failed: no room"):
        runs.confined(program("import sys; print('a', file=sys.stderr); sys.exit('no room')"), "0.5")
    with pytest.raises(runs.RunFailed, match="it said nothing"):
        runs.confined(program("raise SystemExit(3)"), "none")


def test_budgets_in_bytes() -> None:
    assert runs.limit_of("0.5") == 1 << 29
    assert runs.limit_of("none") > 1 << 40
    assert (runs.gib_of("0.5"), runs.gib_of("none")) == (0.5, None)


def test_a_child_is_another_process() -> None:
    assert runs.in_child(os.getpid) != os.getpid()
