"""The frontier tool on a tiny checkpoint: every method runs, and keeping everything loses nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.families import tiny_checkpoint
from tools.benchmarks import page
from tools.benchmarks.harness import record
from tools.research import frontier


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_checkpoint("llama", tmp_path / "checkpoint", hidden_size=96, intermediate_size=160)[1]


def test_frontier(checkpoint: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the thing and the ring are in the inn. " * 20)
    monkeypatch.setattr(frontier, "RANK", 16)
    monkeypatch.setitem(frontier.POINTS, "oracle", ((1.0,), (0.3,)))
    out, plot = tmp_path / "out.json", tmp_path / "plot.png"
    frontier.main([str(checkpoint), str(text), "--tokens", "60", "--out", str(out), "--plot", str(plot)])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found == record.load(out)
    assert {row["method"] for row in found["samples"]} == set(frontier.POINTS)
    everything, some = found["samples"][:2]
    assert everything["losses"] == [0.0]
    assert some["losses"] != [0.0]
    assert all(0 < row["bytes"] <= 1 for row in found["samples"])
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "| oracle | 100% | 100% | +0.00% |" in page.section("frontier-toy", found)


def test_curves_are_means_over_the_texts_by_bytes() -> None:
    samples = [
        {"method": "a", "bytes": 0.5, "losses": [0.0, 0.2]},
        {"method": "b", "bytes": 0.3, "losses": [0.4]},
        {"method": "a", "bytes": 0.25, "losses": [0.5, 0.7]},
    ]
    assert frontier.curves(samples) == {"a": [(0.25, pytest.approx(0.6)), (0.5, 0.1)], "b": [(0.3, 0.4)]}
