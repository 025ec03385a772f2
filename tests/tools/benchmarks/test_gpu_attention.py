"""The benchmark of sparse attention on a GPU, through Triton's interpreter: that all ways are timed and agree."""

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
from tools.benchmarks.gpu_attention import Shape, Step, rates

def seconds(calls):
    begin = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - begin) / len(calls)

shape = Shape("toy", 6, 2, 20, 8)
step = Step(shape, 1, 1024, "cpu")
dense = step.dense().float().flatten()
step.dense_list()
error = ((step.out[0] - dense).square().mean() / dense.square().mean()).sqrt().item()
step.sparse()
attended = step.counts.unique().tolist(), step.always.shape[2]
print(json.dumps([list(rates(shape, 1, 1024, "cpu", 400000, seconds)), error, attended]))
"""


def test_all_ways_are_timed_and_dense_ones_agree() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results, error, ([blocks], always) = json.loads(done.stdout)
    assert [result["kernel"] for result in results] == ["dense", "dense list", "sparse", "sparse, host"]
    assert all(result["microseconds"] > 0 for result in results)
    assert error < 1e-2
    assert blocks * 8 + always == 1024 // 16


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_attention = pytest.importorskip("tools.benchmarks.gpu_attention", reason="torch or triton is not installed")
    monkeypatch.setattr(gpu_attention.torch.cuda, "is_available", lambda: False)
    assert gpu_attention.main([]) == 0
    assert "Nothing was done" in capsys.readouterr().out
