"""The benchmark of sparse mode, at toy size."""

from __future__ import annotations

from pathlib import Path

from flashrt.calibration.pipeline import Request, calibrate
from flashrt.engine.options import LoadOptions
from tests.tools.support import run_tool, tiny_pack


def test_sparse(tmp_path: Path) -> None:
    pack = tiny_pack(tmp_path)
    request = Request(max_loss=1.0, tokens=768)
    calibrate(pack, LoadOptions(cache_dir=tmp_path / "cache", threads=2), request, lambda *_: None)
    text = tmp_path / "text.txt"
    text.write_text("the thing and the ring are in the inn. " * 20)
    options = ("--tokens", "4", "--repeat", "2", "--prompt", "the", "--text-tokens", "64", "--texts", text)
    found = run_tool("tools.benchmarks.sparse", tmp_path / "out", pack, *options)
    runs = [sample for sample in found["samples"] if "mode" in sample]
    assert [sample["mode"] for sample in runs] == ["exact", "sparse", "sparse", "exact"]
    (quality,) = (sample for sample in found["samples"] if "text" in sample)
    assert quality["text"] == "text.txt"
    assert quality["ppl_sparse"] > 0
    speeds, _ = found["summary"]["tables"]
    assert speeds["rows"][0][3]["count"] == 2
