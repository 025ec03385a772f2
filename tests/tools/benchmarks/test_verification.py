"""The benchmark of passes over several positions, at toy size."""

from __future__ import annotations

from pathlib import Path

from tests.tools.support import run_tool, tiny_pack


def test_verification(tmp_path: Path) -> None:
    options = ("--budgets", "none", "--rounds", "3")
    found = run_tool("tools.benchmarks.verification", tmp_path / "out", tiny_pack(tmp_path), *options)
    positions = [sample["positions"] for sample in found["samples"]]
    assert positions == [1, 2, 4, 8, 16, 2, 4, 8, 16, 1, 4, 8, 16, 1, 2]
    for sample in found["samples"]:
        (one,) = (s for s in found["samples"] if s["positions"] == 1 and s["round"] == sample["round"])
        assert sample["over_one"] == sample["seconds"] / one["seconds"]
