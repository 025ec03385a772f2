"""The rates of the GPU's kernels, taken through Triton's interpreter: that they are taken, not what they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PROGRAM = """
import json, time
from tools.benchmarks.gpu_kernels import gather_rates, glu_rates

def seconds(calls):
    begin = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - begin) / len(calls)

shape = 40, 20, 6000, "cpu", seconds
print(json.dumps([list(glu_rates(*shape)), list(gather_rates(*shape))]))
"""


def test_every_share_is_timed() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    products, copies = json.loads(done.stdout)
    assert [(result["tokens"], result["rows"]) for result in products] == [(t, n) for t in (1, 4) for n in (2, 8, 20)]
    assert [result["rows"] for result in copies] == [2, 8, 20]
    assert all(result["bytes_per_s"] > 0 for result in products + copies)
