"""The benchmark of prefill, at toy size."""

from __future__ import annotations

from pathlib import Path

from tests.tools.support import run_tool, tiny_pack


def test_prefill(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the thing and the ring are in the inn. " * 20)
    options = ("--tokens", 40, 90, "--budget", "1.5", "--repeat", 1, "--texts", tmp_path / "text.txt")
    found = run_tool("tools.benchmarks.prefill", tmp_path / "out", tiny_pack(tmp_path), *options, "--isa", "scalar")
    assert [(sample["tokens"], sample["way"]) for sample in found["samples"]] == [
        (40, "flashrt, scalar"),
        (90, "flashrt, scalar"),
    ]
    for sample in found["samples"]:
        assert sample["tok_per_s"] == sample["tokens"] / sample["seconds"]
        assert 0 < sample["peak_rss_bytes"] <= sample["budget_bytes"]
