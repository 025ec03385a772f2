"""Reads slowed down to the rate of another disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.run_in_cgroup import CgroupUnavailable
from tools.slow_disk import BLKIO, disk_of, slow_disk


def test_this_process_is_confined_and_set_free_again(tmp_path: Path) -> None:
    try:
        with slow_disk(Path(__file__), 1_000_000_000):
            (cgroup,) = BLKIO.glob("flashrt-*")
            limit = (cgroup / "blkio.throttle.read_bps_device").read_text().split()
            assert limit == [disk_of(Path(__file__)), "1000000000"]
            assert f"/{cgroup.name}\n" in Path("/proc/self/cgroup").read_text()
    except CgroupUnavailable as error:
        pytest.skip(str(error))
    assert not list(BLKIO.glob("flashrt-*"))
    assert "flashrt-" not in Path("/proc/self/cgroup").read_text()
