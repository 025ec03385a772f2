"""The benchmark of drafts, at toy size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flashrt_kernels.rows import Codec
from tests.engine.support import make_pack
from tests.families import tiny_checkpoint
from tools import benchmarks_page


@pytest.mark.parametrize("kind", [[], ["--ablation"]], ids=["runs", "parts"])
def test_bench_speculation(tmp_path: Path, kind: list[str]) -> None:
    _, checkpoint = tiny_checkpoint("qwen2", tmp_path / "checkpoint", seed=3)
    make_pack(checkpoint, tmp_path / "pack", Codec.INT4)
    arguments = ["--budgets", "none", "--sets", "code", "--count", "2", "--tokens", "6", "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "tools.bench_speculation", str(tmp_path / "pack"), *arguments, *kind]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads((tmp_path / "out").read_text())
    found = result["budgets"]["none"]["code"]
    assert found["same_text"] if not kind else found["all"]["tokens_per_pass"] >= 1
    assert "no limit" in benchmarks_page.section("speculation-tiny", result)
