"""A long run needs no more memory at its end than at its beginning."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from flashrt.storage.pack import Pack
from flashrt_kernels.rows import Codec
from tools.make_synthetic_pack import PRESETS, make
from tools.run_in_cgroup import run_limited

pytestmark = [pytest.mark.budget, pytest.mark.slow, pytest.mark.timeout(1000)]

MIB = 1 << 20
ROOT = Path(__file__).parents[2]
SHAPE = replace(PRESETS["llama-2-7b"], hidden=1024, layers=8, heads=8, kv_heads=2, neurons=2816)
TOKENS = 2000
BUDGET_GB = 0.125

PROGRAM = """
import json, sys
import psutil
import flashrt

engine = flashrt.load(sys.argv[1], float(sys.argv[2]), context=4096, cache_dir=sys.argv[3])
process, resident = psutil.Process(), []
for i, _ in enumerate(engine.generate("The budget holds.", int(sys.argv[4]), ignore_eos=True)):
    if i % 100 == 0:
        resident.append(process.memory_info().rss)
print(json.dumps({"resident": resident, "threads": process.num_threads(), "files": process.num_fds(),
                  "read": engine.bytes_read, "tokens": engine.sequence.length}))
"""


def test_two_thousand_tokens_at_a_tight_budget(tmp_path: Path) -> None:
    pack = tmp_path / "model.pack"
    make(pack, "a tight fit", SHAPE, Codec.INT8)
    command = [sys.executable, "-c", PROGRAM, str(pack), str(BUDGET_GB), str(tmp_path), str(TOKENS)]
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": "/usr/bin:/bin"}
    budget = int(BUDGET_GB * (1 << 30))
    result = run_limited(command, budget, env=env, timeout=900)
    assert result.returncode == 0, result.stderr
    assert result.peak_rss_bytes <= budget
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["tokens"] >= TOKENS
    assert report["read"] > 100 * Pack(pack).layout.nbytes, "it streams"
    resident = report["resident"]
    assert max(resident[1:]) - resident[1] <= MIB
    assert report["threads"] <= 16
    assert report["files"] <= 32
