"""The comparison of rules of acceptance, at toy size: the figures are what theory says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tools.bench_acceptance import RULES, match_likeliest, pairs, residual, softmax

ROOT = Path(__file__).parents[2]


def test_it_runs(tmp_path: Path) -> None:
    out = tmp_path / "acceptance.json"
    command = [sys.executable, "-m", "tools.bench_acceptance", "--tokens", "50", "--vocab", "60", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout.splitlines()[-1])
    assert data == json.loads(out.read_text())
    for pair in data["pairs"]:
        for figures in (pair[f"temperature {t}"] for t in ("0.5", "0.7", "1")):
            assert figures["rules"].keys() == RULES.keys()
            assert all(0 < rates[0] <= rates[1] <= rates[2] <= 1 for rates in figures["rules"].values())


def test_rates_against_theory() -> None:
    target, draft = pairs(0.7, 3000, 30)
    assert (target.argmax(1) == draft.argmax(1)).mean() == pytest.approx(0.7, abs=0.02)
    p, q = softmax(target), softmax(draft)
    overlap = float(np.minimum(p, q).sum(1).mean())
    assert residual(p, q, 1) == pytest.approx(overlap, abs=0.02)
    for name, rule in RULES.items():
        assert rule(p, p, 1) == pytest.approx(float(p.max(1).mean()) if "likeliest" in name else 1)
        assert rule(p, q, 1) < overlap + 0.02
    assert match_likeliest(p, q, 30) == pytest.approx(1)
