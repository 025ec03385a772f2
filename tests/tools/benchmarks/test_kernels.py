"""The benchmark of kernels, at toy size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.benchmarks import kernels, page
from tools.benchmarks.harness import record


def test_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(kernels, "BYTES", 1 << 16)
    kernels.main(["--hidden", "96", "--seconds", "0", "--threads", "1", "--out", str(tmp_path / "out")])
    found = record.load(tmp_path / "out")
    assert found == json.loads(capsys.readouterr().out.splitlines()[-1])
    groups = {sample["group"] for sample in found["samples"]}
    assert groups == {"narrow", "wide", "attention", "quantize"}
    narrow = [s for s in found["samples"] if s["group"] == "narrow"]
    assert len(narrow) == 3 * 5 * 2 * kernels.LEAST
    assert all(sample["gb_per_s"] > 0 and sample["share"] > 0 for sample in narrow)
    errors = {s["op"]: s["rms_error"] for s in found["samples"] if s.get("codec") == "int4" and "rms_error" in s}
    assert 0 < errors["quantize"] < errors["rounding to nearest, groups of 32"] < 0.2
    assert "| glu | int4 | 16 |" in page.section("kernels-toy", found)
