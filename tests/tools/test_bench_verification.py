"""The benchmark of passes over several positions, at toy size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from flashrt_kernels.rows import Codec
from tests.engine.support import make_pack
from tests.families import tiny_checkpoint
from tools import benchmarks_page


def test_bench_verification(tmp_path: Path) -> None:
    _, checkpoint = tiny_checkpoint("qwen2", tmp_path / "checkpoint", seed=3)
    make_pack(checkpoint, tmp_path / "pack", Codec.INT4)
    arguments = ["--budgets", "none", "--rounds", "2", "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "tools.bench_verification", str(tmp_path / "pack"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads((tmp_path / "out").read_text())
    cell = result["budgets"]["none"]
    assert list(cell["passes"]) == ["1", "2", "4", "8", "16"]
    assert cell["ratio_16"] > 0
    assert "no limit" in benchmarks_page.section("verification-tiny", result)
