"""A batch within a memory cgroup of exactly its budget: places of sequences and answers count."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from flashrt_kernels.rows import Codec
from tests.budget.test_memory import GIB, ROOT, SHAPE, USED
from tools.make_synthetic_pack import make
from tools.run_in_cgroup import run_limited

pytestmark = pytest.mark.budget


def test_a_batch_stays_within_its_budget(tmp_path: Path) -> None:
    budget = int(0.3 * GIB)
    make(tmp_path / "pack", "half a GiB", SHAPE, Codec.INT8)
    (tmp_path / "in.txt").write_text("".join(f"{i} times the budget holds.\n" for i in range(14)))
    command = [sys.executable, "-m", "flashrt", "batch", str(tmp_path / "pack"), str(tmp_path / "in.txt")]
    command += [str(tmp_path / "out.jsonl"), "-n", "3", "--budget-gb", "0.3", "--cache-dir", str(tmp_path), "--json"]
    command += ["--sequences", "12"]
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": "/usr/bin:/bin"}
    result = run_limited(command, budget, env=env, timeout=120)
    assert not result.oom_killed, result.stderr
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures["answered"] == 14
    assert USED * budget <= result.peak_rss_bytes <= budget
