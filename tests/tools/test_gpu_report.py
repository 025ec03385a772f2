"""The GPU report, as far as a machine without a GPU can tell."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools import gpu_report

ROOT = Path(__file__).parents[2]


def test_without_a_gpu_it_says_so_and_does_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_report, "why_not", lambda: "torch sees no CUDA device")
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", "--out", str(tmp_path / "report.json")])
    assert gpu_report.main() == 0
    assert "no GPU to report on: torch sees no CUDA device" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_it_starts_from_a_bare_checkout() -> None:
    """Nothing of flashrt need be installed or compiled to get as far as the question whether there is a GPU."""
    program = (
        "import sys; sys.modules['flashrt'] = sys.modules['flashrt_kernels'] = None; "
        "import tools.gpu_report as r; r.why_not = lambda: 'test'; sys.argv = ['r']; raise SystemExit(r.main())"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Nothing was done" in done.stdout


def test_any_trouble_is_a_failure() -> None:
    good = {"tests": {"status": 0}, "kernels": [{"bytes_per_s": 1}], "benchmark": [{"decode_tok_per_s": 1.0}]}
    assert not gpu_report.failed(good)
    assert gpu_report.failed(good | {"tests": {"error": "pytest is not installed"}})
    assert gpu_report.failed(good | {"tests": {"status": 1}})
    assert gpu_report.failed(good | {"benchmark": [{"error": "out of memory"}]})
    assert gpu_report.failed(good | {"kernels": [{"error": "triton is not installed"}]})
