"""The GPU report, as far as a machine without a GPU can tell."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools.benchmarks import gpu_report, page
from tools.benchmarks.harness import record

ROOT = Path(__file__).parents[3]


def test_without_a_gpu_it_says_so_and_does_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_report, "why_not", lambda: "torch sees no CUDA device")
    assert gpu_report.main(["--out", str(tmp_path / "report.json")]) == 0
    assert "no GPU to report on: torch sees no CUDA device" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_it_starts_from_a_bare_checkout() -> None:
    """Nothing of flashrt need be installed or compiled to get as far as the question whether there is a GPU."""
    program = (
        "import sys; sys.modules['flashrt'] = sys.modules['flashrt_kernels'] = None; "
        "import tools.benchmarks.gpu_report as r; r.why_not = lambda: 'test'; raise SystemExit(r.main([]))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Nothing was done" in done.stdout


def test_the_record_holds_every_part(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = {"kernel": "glu_rows", "shape": "toy", "tokens": 1, "rows": 2, "bytes_per_s": 3e9}
    parts = {
        "why_not": None,
        "describe": {"gpu": "a GPU"},
        "run_tests": {"status": 0, "tests": 7},
        "copy_rates": {"h2d_pinned_bytes_per_s": 2e9},
        "kernel_rates": [kernel],
        "benchmark": [{"dtype": "int4", "budget": "half", "error": "out of time"}],
    }
    for name, found in parts.items():
        monkeypatch.setattr(gpu_report, name, lambda *_, found=found: found)
    assert gpu_report.main(["--out", str(tmp_path / "gpu.json")]) == 1
    found = record.load(tmp_path / "gpu.json")
    assert found["machine"]["gpu"] == "a GPU"
    assert found["samples"] == [
        {"part": "copies", "h2d_pinned_bytes_per_s": 2e9},
        {"part": "kernels", **kernel},
        {"part": "benchmark", "dtype": "int4", "budget": "half", "error": "out of time"},
    ]
    section = page.section("gpu", found)
    for expected in (
        "status 0, tests 7",
        "| h2d_pinned_bytes_per_s | 2,000 MB/s |",
        "| int4 | half | – | – | out of time |",
    ):
        assert expected in section


def test_any_trouble_is_a_failure() -> None:
    good = {"tests": {"status": 0}, "kernels": [{"bytes_per_s": 1}], "benchmark": [{"decode_tok_per_s": 1.0}]}
    assert not gpu_report.failed(good)
    assert gpu_report.failed(good | {"tests": {"error": "pytest is not installed"}})
    assert gpu_report.failed(good | {"tests": {"status": 1}})
    assert gpu_report.failed(good | {"benchmark": [{"error": "out of memory"}]})
    assert gpu_report.failed(good | {"kernels": [{"error": "triton is not installed"}]})


def test_a_kernel_that_fails_leaves_the_others_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_attention = pytest.importorskip("tools.benchmarks.gpu_attention", reason="torch or triton is not installed")
    gpu_kernels = pytest.importorskip("tools.benchmarks.gpu_kernels", reason="torch or triton is not installed")

    def fail() -> None:
        raise RuntimeError("out of shared memory")

    monkeypatch.setattr(gpu_kernels, "measure", fail)
    monkeypatch.setattr(gpu_attention, "measure", lambda: [{"kernel": "sparse"}])
    assert gpu_report.kernel_rates() == [{"error": "RuntimeError: out of shared memory"}, {"kernel": "sparse"}]
