"""The I/O benchmark at toy size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("backend", ["", "pread"])
def test_it_measures_and_says_so(tmp_path: Path, backend: str) -> None:
    data = tmp_path / "data"
    data.write_bytes(np.random.default_rng(0).bytes(4 << 20))
    command = [sys.executable, "-m", "tools.bench_io", str(data), "--blocks", "4096", "65536", "--depths", "1", "4"]
    command += ["--repeat", "2", "--seconds", "0.01", "--plain", "--backend", backend]
    command += ["--out", str(tmp_path / "o.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads((tmp_path / "o.json").read_text())
    assert len(result["blocks"]) == 8
    assert all(point["bytes_per_s"] > 0 and point["reference_bytes_per_s"] > 0 for point in result["blocks"])
    assert all(0 < point["useful"] <= 1 for point in result["rows"])
    if backend:
        assert result["backend"] == backend
