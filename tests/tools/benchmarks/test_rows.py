"""The benchmark of row cache and predictor at toy size."""

from __future__ import annotations

from pathlib import Path

from flashrt_kernels.rows import Codec
from tests.conftest import MakePack
from tests.fake_source import DENSE
from tests.tools.support import run_tool


def test_it_measures_and_says_so(make_pack: MakePack, tmp_path: Path) -> None:
    pack = make_pack(DENSE, Codec.INT8)
    options = ("--active", "0.3", "--tokens", "20", "--rank", "4")
    found = run_tool("tools.benchmarks.rows", tmp_path / "out", pack, *options)
    ensured = [sample for sample in found["samples"] if sample["part"] == "ensure"]
    predicted = [sample for sample in found["samples"] if sample["part"] == "predict"]
    assert len(ensured) == 10
    assert found["summary"]["counts"]["asked"] == 10 * int(0.3 * 70)
    assert all(sample["seconds"] > 0 for sample in ensured + predicted)
    assert all(sample["processor_s"] > 0 for sample in ensured)
