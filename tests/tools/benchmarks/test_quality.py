"""Perplexity beside transformers', at toy size."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tools.support import run_tool, tiny_pack


def test_quality(tmp_path: Path) -> None:
    pack, text = tiny_pack(tmp_path), tmp_path / "text.txt"
    text.write_text("the thing and the ring are in the inn. " * 20)
    options = ("--checkpoint", tmp_path / "checkpoint", "--text-file", text, "--tokens", "60", "--window", "32")
    found = run_tool("tools.benchmarks.quality", tmp_path / "out", pack, *options, "--as-decoded")
    scored = {sample["system"]: sample for sample in found["samples"]}
    assert list(scored) == ["transformers bf16", "flashrt int4", "flashrt int4 as decoded"]
    assert len({sample["tokens"] for sample in scored.values()}) == 1
    assert scored["flashrt int4"]["ppl"] == pytest.approx(scored["transformers bf16"]["ppl"], rel=0.3)
    (table,) = found["summary"]["tables"]
    assert table["rows"][0][2] == 0
