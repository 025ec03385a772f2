"""The comparison of rules of acceptance, at toy size: the figures are what theory says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.tools.support import run_tool
from tools.research.acceptance import RULES, match_likeliest, pairs, residual, softmax


def test_it_runs(tmp_path: Path) -> None:
    found = run_tool("tools.research.acceptance", tmp_path / "out", "--tokens", "50", "--vocab", "60")
    assert len(found["samples"]) == 3 * 3 * len(RULES)
    for sample in found["samples"]:
        assert 0 < sample["width 1"] <= sample["width 2"] <= sample["width 4"] <= 1


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
