"""The benchmark of kernels, at toy size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.benchmarks import kernels, page
from tools.benchmarks.harness import record


def test_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(kernels, "BYTES", 1 << 16)
    toy = ["--hidden", "96", "--seconds", "0", "--threads", "1", "--contexts", "512", "600", "--keep", "1/8"]
    kernels.main([*toy, "--out", str(tmp_path / "out")])
    found = record.load(tmp_path / "out")
    assert found == json.loads(capsys.readouterr().out.splitlines()[-1])
    groups = {sample["group"] for sample in found["samples"]}
    assert groups == {"narrow", "wide", "attention", "chosen", "quantize"}
    narrow = [s for s in found["samples"] if s["group"] == "narrow"]
    assert len(narrow) == 3 * 5 * 2 * kernels.LEAST
    assert all(sample["gb_per_s"] > 0 and sample["share"] > 0 for sample in narrow)
    errors = {s["op"]: s["rms_error"] for s in found["samples"] if s.get("codec") == "int4" and "rms_error" in s}
    assert 0 < errors["quantize"] < errors["rounding to nearest, groups of 32"] < 0.2
    chosen = [s for s in found["samples"] if s["group"] == "chosen"]
    assert [(s["context"], s["keep"]) for s in chosen] == [(n, "1/8") for n in (512, 600) for _ in range(kernels.LEAST)]
    assert all(s["times"] == pytest.approx(s["dense_s"] / (s["select_s"] + s["list_s"])) for s in chosen)
    section = page.section("kernels-toy", found)
    assert "| glu | int4 | 16 |" in section
    assert "| select, attention_list | bf16 | 512 | 1/8 |" in section


def test_kernels_of_some_groups(capsys: pytest.CaptureFixture[str]) -> None:
    kernels.main(["--seconds", "0", "--threads", "2", "--groups", "chosen", "--contexts", "300", "--keep", "0.5"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {(s["group"], s["context"], s["keep"]) for s in found["samples"]} == {("chosen", 300, "1/2")}
    assert [column["name"] for column in found["summary"]["tables"][0]["columns"]][:4] == [
        "chosen",
        "codec",
        "context",
        "kept",
    ]
