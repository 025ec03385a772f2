"""The ablation of chosen keys and values on disk, at toy size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools.support import run_tool

TEXT = "the thing and the ring are in the inn, and another thing is in the ring. " * 10


def test_ways_take_turns(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    make = [sys.executable, "tools/make_synthetic_pack.py", str(tmp_path / "pack"), "--kv-labels"]
    subprocess.run([*make, "--context", "200000", "--layers", "3"], check=True, capture_output=True)
    options = ("--context", 120_000, "--budget-gb", 0.13, "--steps", 3, "--repeat", 2, "--text-tokens", 500)
    found = run_tool(
        "tools.research.cells", tmp_path / "out", tmp_path / "pack", *options, "--text", tmp_path / "text.txt"
    )
    ways = ["as it is", "always guess", "never guess", "heads at once", "LRU", "no cache"]
    assert [sample["way"] for sample in found["samples"]] == ways + ways[1:] + ways[:1]
    for sample in found["samples"]:
        assert sample["cells"] > 3 * 3 * 512 / 64
        guessed = sample["lookahead_recall"]
        if sample["way"] == "always guess":
            assert guessed > 0
        elif sample["way"] not in ("as it is", "heads at once"):
            assert guessed < 0.2  # what an earlier way had read ahead
        if sample["way"] == "no cache":
            assert sample["cached"] == pytest.approx(0, abs=0.01)
    assert len(found["summary"]["tables"][0]["rows"]) == 6
