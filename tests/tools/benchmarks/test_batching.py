"""The benchmark of batches, at toy size, and what it says of systems that failed."""

from __future__ import annotations

from pathlib import Path

from tests.tools.support import run_tool, tiny_pack
from tools.benchmarks.batching import _summary


def test_batching(tmp_path: Path) -> None:
    options = ("--requests", "4", "--single", "2", "--tokens", "3", "--sequences", "2")
    found = run_tool("tools.benchmarks.batching", tmp_path / "out", tiny_pack(tmp_path), *options)
    single, chosen, two = found["samples"]
    assert [sample["tokens"] for sample in (single, chosen, two)] == [6, 12, 12]
    assert chosen["same_texts"]
    assert two["same_texts"]
    assert two["sequences"] == 2


def test_what_failed_is_no_best() -> None:
    samples = [
        {"system": "one after the other", "sequences": 1, "tok_per_s": 2.0},
        {"system": "together", "sequences": 8, "tok_per_s": 10.0},
        {"system": "llama.cpp, 8 slots", "sequences": 8, "failure": "timeout"},
    ]
    parameters = {"model": "m", "requests": 8, "tokens": 4, "single": 2, "budget_gb": 1.0}
    assert _summary(samples, parameters)["text"][1] == "Together: 5.00× over one after the other."
