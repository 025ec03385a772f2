"""The benchmark of budgets, at toy size."""

from __future__ import annotations

from pathlib import Path

from tests.tools.support import run_tool, tiny_pack
from tools.benchmarks import page


def test_budgets(tmp_path: Path) -> None:
    found = run_tool(
        "tools.benchmarks.budgets", tmp_path / "out", tiny_pack(tmp_path),
        *("--budgets", "none", "0.4", "0.001", "--tokens", "5", "--repeat", "2", "--prompt", "the thing"),
    )  # fmt: skip
    assert found["summary"]["same_tokens"]
    assert [(s["budget"], s["round"]) for s in found["samples"]] == [
        *(("none", 0), ("0.4", 0), ("0.001", 0)),
        *(("0.4", 1), ("0.001", 1), ("none", 1)),
    ]
    for sample in found["samples"]:
        if sample["budget"] == "0.001":
            assert "failed" in sample
        else:
            assert sample["decode_tok_per_s"] > 0
            assert sample["disk_plain_bytes_per_s"] >= 0
            assert 0 < (sample["budget_used"] or 0.5) <= 1
    section = page.section("budgets-toy", found)
    assert "| no limit |" in section
    assert "| 0.001 GiB | – |" in section
    assert "At 0.001: a run at 0.001 failed" in section
