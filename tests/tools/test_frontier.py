"""The frontier tool on a tiny checkpoint: every method runs, and keeping everything loses nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.families import tiny_checkpoint
from tools import frontier


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_checkpoint("llama", tmp_path / "checkpoint", hidden_size=96, intermediate_size=160)[1]


def test_frontier(checkpoint: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the thing and the ring are in the inn. " * 20)
    monkeypatch.setattr(frontier, "RANK", 16)
    monkeypatch.setitem(frontier.POINTS, "oracle", ((1.0,), (0.3,)))
    assert frontier.main([str(checkpoint), str(text), "--tokens", "60", "--out", str(tmp_path / "out.json")]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads((tmp_path / "out.json").read_text())
    assert {row["method"] for row in result["rows"]} == set(frontier.POINTS)
    everything, some = result["rows"][:2]
    assert everything["losses"] == [0.0]
    assert some["losses"] != [0.0]
    assert all(0 < row["bytes"] <= 1 for row in result["rows"])
