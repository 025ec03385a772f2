"""The benchmark of row cache and predictor at toy size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from flashrt_kernels.rows import Codec
from tests.conftest import MakePack
from tests.fake_source import DENSE

ROOT = Path(__file__).parents[2]


def test_it_measures_and_says_so(make_pack: MakePack, tmp_path: Path) -> None:
    pack = make_pack(DENSE, Codec.INT8)
    command = [sys.executable, "-m", "tools.bench_rows", str(pack), "--active", "0.3", "--tokens", "20", "--rank", "4"]
    done = subprocess.run([*command, "--out", str(tmp_path / "o.json")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads((tmp_path / "o.json").read_text())
    cache = result["cache"]
    assert cache["asked"] == cache["tokens"] * int(0.3 * 70)
    assert cache["median_us"] > 0
    assert cache["median_processor_us"] > 0
    assert result["predictor"]["median_us"] > 0
