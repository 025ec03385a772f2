"""Policies of a cache of experts: traces follow their habit, the simulation is what a list gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.tools.support import run_tool
from tools.make_synthetic_pack import PRESETS
from tools.research.expert_policies import HABITS, Habit, simulate, synthetic_trace

MIXTRAL = PRESETS["mixtral-8x7b"]


def test_it_runs(tmp_path: Path) -> None:
    found = run_tool("tools.research.expert_policies", tmp_path / "out", "--slots", "75", "--tokens", "9")
    assert [sample["habit"] for sample in found["samples"]] == list(HABITS)
    for sample in found["samples"]:
        assert sample["clairvoyant"] >= max(sample["LRU"], sample["forecast"]) > 0


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
