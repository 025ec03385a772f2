"""What cgroups leave a process, read from made-up hierarchies of both versions."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from flashrt.machine import process

NO_LIMIT = 9223372036854771712


class Machine:
    """/proc/self and the cgroup file systems below a directory."""

    def __init__(self, root: Path, own: str) -> None:
        self.root, self.mounts = root, ""
        (root / "proc").mkdir()
        (root / "proc" / "cgroup").write_text(own)

    def mount(self, point: str, kind: str, options: str, root: str = "/") -> None:
        self.mounts += f"35 31 0:32 {root} {self.root / point} rw,nosuid shared:9 - {kind} cgroup rw,{options}\n"
        (self.root / "proc" / "mountinfo").write_text("1 0 0:1 / / rw - ext4 /dev/a rw\n" + self.mounts)

    def write(self, group: str, **files: object) -> None:
        directory = self.root / group
        directory.mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            (directory / name.replace("__", ".")).write_text(f"{value}\n")


@pytest.fixture
def v2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(tmp_path, "0::/user/job\n")
    machine.mount("cg", "cgroup2", "nsdelegate")
    machine.write("cg/user/job", memory__max="max", memory__current=500, memory__stat="anon 400\ninactive_file 50")
    monkeypatch.setattr(process, "PROC", tmp_path / "proc")
    return machine


@pytest.fixture
def v1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(tmp_path, "9:name=systemd:/\n4:memory:/a/b\n2:cpu,cpuacct:/a\n0::/\n")
    machine.mount("memory", "cgroup", "memory")
    machine.mount("cpu,cpuacct", "cgroup", "cpu,cpuacct")
    machine.write("memory", memory__limit_in_bytes=NO_LIMIT, memory__usage_in_bytes=900, memory__stat="")
    monkeypatch.setattr(process, "PROC", tmp_path / "proc")
    return machine


def test_version_2(v2: Machine) -> None:
    assert process.memory_limit() is None
    v2.write("cg/user/job", memory__max=1000)
    assert process.memory_limit() == 1000
    assert process._cgroup_left() == [550]  # what is in use, but for pages that can be taken back
    assert process.available_bytes() == 550


def test_ancestors_count(v2: Machine) -> None:
    v2.write("cg/user", memory__max=800, memory__current=780, memory__stat="inactive_file 100")
    v2.write("cg/user/job", memory__max=1000)
    assert process.memory_limit() == 800
    assert process.available_bytes() == 120
    v2.write("cg/user", memory__current=2000)
    assert process.available_bytes() == 0


def test_version_1(v1: Machine) -> None:
    assert process.memory_limit() is None
    stat = "inactive_file 1\ntotal_inactive_file 100"
    v1.write("memory/a", memory__limit_in_bytes=600, memory__usage_in_bytes=400, memory__stat=stat)
    v1.write("memory/a/b", memory__limit_in_bytes=700, memory__usage_in_bytes=300)
    assert process.memory_limit() == 600
    assert sorted(process._cgroup_left()) == [300, 400]


def test_cores(v1: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process.psutil.Process, "cpu_affinity", lambda own: list(range(16)))
    assert process.usable_cores() == 16
    v1.write("cpu,cpuacct", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100000)
    assert process.usable_cores() == 16
    v1.write("cpu,cpuacct/a", cpu__cfs_quota_us=350000, cpu__cfs_period_us=100000)
    assert process.usable_cores() == 4


def test_cores_of_version_2(v2: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process.psutil.Process, "cpu_affinity", lambda own: list(range(16)))
    v2.write("cg/user/job", cpu__max="max 100000")
    v2.write("cg/user", cpu__max="150000 100000")
    assert process.usable_cores() == 2


@pytest.mark.parametrize("own", ["0::/docker/x/job\n", "0::/../elsewhere\n"])
def test_a_mount_that_shows_a_part_of_the_hierarchy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str) -> None:
    """In a container the mount shows what lies below its own cgroup, or a path leads out of it."""
    machine = Machine(tmp_path, own)
    machine.mount("cg", "cgroup2", "rw", root="/docker/x" if "docker" in own else "/")
    machine.write("cg", memory__max=1000, memory__current=100)
    machine.write("cg/job", memory__max=500, memory__current=100)
    monkeypatch.setattr(process, "PROC", tmp_path / "proc")
    assert process.memory_limit() == (500 if "docker" in own else 1000)


def test_nothing_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "PROC", tmp_path / "none")
    assert process.memory_limit() is None
    assert process.available_bytes() > 0
    assert process.usable_cores() >= 1


def test_what_is_taken_shows() -> None:
    """Against figures of the kernel's that the module does not read."""
    before = process.resident_bytes()
    taken = mmap.mmap(-1, 48 << 20)  # the allocator might hand out again what others gave back
    taken.write(b"x" * len(taken))
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    assert abs(process.resident_bytes() - pages * os.sysconf("SC_PAGE_SIZE")) < 2 << 20
    assert process.resident_bytes() - before > 40 << 20
    assert process.peak_resident_bytes() >= before + (40 << 20)
    taken.close()
    assert process.installed_bytes() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert process.available_bytes() < process.installed_bytes()
