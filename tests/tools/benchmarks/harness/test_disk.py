"""The rate of a disk, and reads slowed down to that of another one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tools.benchmarks.harness.disk import BLKIO, disk_label, disk_of, plain_rates, slow_disk
from tools.run_in_cgroup import CgroupUnavailable


def test_this_process_is_confined_and_set_free_again() -> None:
    own = f"flashrt-{os.getpid()}-*"
    try:
        with slow_disk(Path(__file__), 1.0):
            (cgroup,) = BLKIO.glob(own)
            limit = (cgroup / "blkio.throttle.read_bps_device").read_text().split()
            assert limit == [disk_of(Path(__file__)), "1000000000"]
            assert f"/{cgroup.name}\n" in Path("/proc/self/cgroup").read_text()
    except CgroupUnavailable as error:
        pytest.skip(str(error))
    assert not list(BLKIO.glob(own))
    assert "flashrt-" not in Path("/proc/self/cgroup").read_text()


def test_plain_rates_are_what_is_said(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(os.urandom(9 << 20))
    rates = plain_rates(tmp_path / "data")
    assert all(rate > 0 for rate in rates.values())
    known = {"disk_plain_bytes_per_s": 1.25e9, "disk_deep_bytes_per_s": 2.5e9}
    assert rates.keys() == known.keys()
    said = "plain reads get 1.25 GB/s, several at once 2.50."
    assert disk_label(None, known) == f"The disk is as fast as it is; {said}"
    assert disk_label(1.1, known) == f"The disk is held to 1.1 GB/s; {said}"
