"""The benchmark of the cache of experts, at toy size: it runs, compares like with like, and its page can be written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tools import benchmarks_page
from tools.bench_experts import HABITS, WAYS, Habit, simulate, synthetic_trace
from tools.make_synthetic_pack import PRESETS

ROOT = Path(__file__).parents[2]
TOY = ["--hidden", "1024", "--layers", "3", "--heads", "8", "--kv-heads", "2", "--neurons", "1100", "--vocab", "300"]
MIXTRAL = PRESETS["mixtral-8x7b"]


def test_it_runs(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    out = tmp_path / "docs" / "experts-toy.json"
    command = [sys.executable, "-m", "tools.bench_experts", str(tmp_path), *TOY, "--context", "256", "--out", str(out)]
    command += ["--budget-gb", "0.1", "--skews", "1.5", "--tokens", "5", "--repeat", "1", "--traced-tokens", "9"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout.splitlines()[-1])
    assert data == json.loads(out.read_text())
    assert not list(tmp_path.glob("mixtral*")), "a pack that it wrote is removed"
    pack = data["packs"]["skew 1.5"]
    assert pack["same_tokens"]
    assert tuple(pack["ways"]) == WAYS
    assert pack["ways"]["blocks"]["expert_cache"] is None
    assert pack["ways"]["cache"]["expert_cache"]["hits"] > 0
    assert pack["ways"]["no look-ahead"]["expert_cache"]["prefetched"] == 0
    assert data["synthetic_traces"].keys() == HABITS.keys()
    page = benchmarks_page.page(tmp_path / "docs")
    assert "## experts-toy" in page
    assert "| skew 1.5 | tokens/s |" in page
    assert "| Zipf 1, 20% kept, drift |" in page


def test_traces_follow_their_habit() -> None:
    random = np.random.default_rng(0)
    alike = synthetic_trace(MIXTRAL, Habit(0, 0, 0), 300, random)
    sticky = synthetic_trace(MIXTRAL, Habit(0, 0.5, 0), 300, random)
    skewed = synthetic_trace(MIXTRAL, Habit(1, 0, 0), 300, random)
    assert alike.shape == (300, 32, 2)
    assert (alike[..., 0] != alike[..., 1]).all()

    def repeated(trace: np.ndarray) -> float:
        return float((trace[1:, :, :, None] == trace[:-1, :, None, :]).any(3).mean())

    assert repeated(alike) == pytest.approx(0.25, abs=0.02)
    assert repeated(sticky) == pytest.approx(0.5 + 0.5 * 0.25, abs=0.06)
    favourite = max(np.bincount(skewed[:, 0].ravel(), minlength=8)) / 300
    assert favourite > 0.6


def test_simulation_against_a_list() -> None:
    """Least recently used, with a plain list of what is there, most recent last."""
    trace = synthetic_trace(MIXTRAL, Habit(0.5, 0.2, 0), 60, np.random.default_rng(2))[:, :4]
    used = np.full((4, 8), -1.0)

    def recency(t: int, layer: int, chosen: np.ndarray) -> np.ndarray:
        used[layer, chosen] = t * 4 + layer
        return used

    there = [(layer, expert) for expert in range(8) for layer in range(4)][:12]
    stamp = dict.fromkeys(there, -1)
    hits = total = 0
    for t, token in enumerate(trace):
        for layer, chosen in enumerate(token):
            named = [(layer, int(expert)) for expert in chosen]
            missing = [key for key in named if key not in stamp]
            if t >= len(trace) // 8:
                total, hits = total + 2, hits + 2 - len(missing)
            for key in named:
                if key in stamp:
                    stamp[key] = t * 4 + layer
            for key in missing:
                oldest = min(stamp[k] for k in stamp if k not in named)
                del stamp[min(k for k in stamp if k not in named and stamp[k] == oldest)]
                stamp[key] = t * 4 + layer
    assert simulate(trace, 8, 12, recency) == pytest.approx(hits / total, abs=0.01)
