"""The harness that memory tests rest on: it must notice what goes over, and measure what does not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools import run_in_cgroup
from tools.run_in_cgroup import CgroupUnavailable, memory_cgroup, run_limited

MIB = 1 << 20
ROOT = Path(__file__).parents[2]


def program(mib: int) -> list[str]:
    return [sys.executable, "-c", f"import time; x = b'x' * ({mib} << 20); time.sleep(0.1); print(len(x) >> 20)"]


@pytest.fixture
def cgroups() -> None:
    try:
        with memory_cgroup(64 * MIB):
            pass
    except CgroupUnavailable as error:
        pytest.skip(f"no memory cgroup here: {error}")


@pytest.mark.usefixtures("cgroups")
def test_within_the_limit() -> None:
    result = run_limited(program(60), 128 * MIB)
    assert (result.returncode, result.stdout.strip(), result.limited, result.oom_killed) == (0, "60", True, False)
    assert 60 * MIB < result.peak_rss_bytes < 90 * MIB
    assert 55 * MIB < result.peak_bytes <= 128 * MIB


@pytest.mark.usefixtures("cgroups")
def test_over_the_limit() -> None:
    result = run_limited(program(200), 64 * MIB)
    assert result.oom_killed
    assert result.returncode != 0


@pytest.mark.usefixtures("cgroups")
def test_nothing_is_left_behind() -> None:
    with memory_cgroup(64 * MIB) as cgroup:
        assert cgroup.path.exists()
    assert not cgroup.path.exists()


def test_without_cgroups_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(run_in_cgroup, "V1", tmp_path / "absent")
    monkeypatch.setattr(run_in_cgroup, "V2", tmp_path / "absent")
    result = run_limited(program(60), MIB)
    assert not result.limited
    assert "cannot be made" in result.why_not
    assert result.returncode == 0
    assert 60 * MIB < result.peak_rss_bytes == result.peak_bytes


def test_a_command_that_hangs() -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        run_limited([sys.executable, "-c", "import time; time.sleep(60)"], 64 * MIB, timeout=0.2)


def test_command_line() -> None:
    command = [sys.executable, "tools/run_in_cgroup.py", "--limit-gb", "0.1", "--"]
    done = subprocess.run(
        [*command, sys.executable, "-c", "print('out'); raise SystemExit(3)"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (3, "out\n")
    assert json.loads(done.stderr.splitlines()[-1])["returncode"] == 3
