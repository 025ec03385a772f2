"""The benchmark of the cache of experts, at toy size: it runs, and compares like with like."""

from __future__ import annotations

from pathlib import Path

from tests.tools.support import run_tool
from tools.benchmarks.experts import WAYS
from tools.benchmarks.harness.samples import only

TOY = ["--hidden", "1024", "--layers", "3", "--heads", "8", "--kv-heads", "2", "--neurons", "1100", "--vocab", "300"]


def test_experts(tmp_path: Path) -> None:
    options = ("--context", "256", "--budget", "0.1", "--skews", "1.5", "--tokens", "5", "--repeat", "1")
    found = run_tool("tools.benchmarks.experts", tmp_path / "out", tmp_path, *TOY, *options)
    assert not list(tmp_path.glob("mixtral*")), "a pack that it wrote is removed"
    samples = {sample["way"]: sample for sample in found["samples"]}
    assert tuple(samples) == WAYS
    assert "hits" not in samples["blocks"]
    assert samples["cache"]["hits"] > 0
    assert samples["no look-ahead"]["prefetched"] == 0
    assert all(sample["roof_tok_per_s"] > 0 for sample in only(found["samples"], skew=1.5))
    ways, over = found["summary"]["tables"]
    assert [row[1] for row in ways["rows"]] == list(WAYS)
    assert over["rows"][0][1]["median"] > 0
