"""The benchmark of sparse mode, at toy size."""

from __future__ import annotations

import json
from pathlib import Path

from flashrt.calibration.pipeline import Request, calibrate
from flashrt.engine.options import LoadOptions
from flashrt_kernels.rows import Codec
from tests.engine.support import make_pack
from tests.families import tiny_checkpoint
from tools import bench_sparse, benchmarks_page


def test_bench_sparse(tmp_path: Path, capsys) -> None:
    _, checkpoint = tiny_checkpoint("qwen2", tmp_path / "checkpoint", seed=3)
    make_pack(checkpoint, tmp_path / "pack", Codec.INT4)
    request = Request(max_loss=1.0, tokens=768)
    calibrate(tmp_path / "pack", LoadOptions(cache_dir=tmp_path / "cache", threads=2), request, lambda *_: None)
    text = tmp_path / "text.txt"
    text.write_text("the thing and the ring are in the inn. " * 20)
    arguments = [str(tmp_path / "pack"), "--tokens", "4", "--repeat", "2", "--prompt", "the", "--text-tokens", "64"]
    assert bench_sparse.main([*arguments, "--texts", str(text), "--out", str(tmp_path / "sparse.json")]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads((tmp_path / "sparse.json").read_text())
    assert len(result["speeds"]["none"]["speedups"]) == 2
    assert result["texts"]["text.txt"]["ppl_sparse"] > 0
    assert "no limit" in benchmarks_page.section("sparse-tiny", result)
