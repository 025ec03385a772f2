#!/usr/bin/env python3
"""Run a command with a hard limit on its memory and say what it took.

    python tools/run_in_cgroup.py --limit-gb 1 -- flashrt run demo --budget-gb 1 --prompt "..."

The command runs in a memory cgroup of its own (version 1 or 2) without swap; the kernel kills what goes over. Where no
cgroup can be made it runs without a limit, its high-water mark is sampled, and the report says so. One JSON object
goes to stderr, the exit status is the command's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

V1 = Path("/sys/fs/cgroup/memory")
V2 = Path("/sys/fs/cgroup")
SAMPLE_S = 0.02
# The shell moves itself into the cgroup, so that every page of the command is charged there.
ENTER = 'echo $$ > "$0" && exec "$@"'


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a command.

    peak_bytes: the most that the cgroup was charged, page cache included; without one, equal to peak_rss_bytes
    peak_rss_bytes: the high-water mark of the process's resident set, kept by the kernel, read until it ended
    limited: whether a cgroup enforced the limit; if not, `why_not` says why
    """

    returncode: int
    stdout: str
    stderr: str
    peak_bytes: int
    peak_rss_bytes: int
    oom_killed: bool
    limited: bool
    why_not: str = ""


class CgroupUnavailable(Exception):
    """No memory cgroup can be made here; the message says why."""


@dataclass(frozen=True, slots=True)
class Cgroup:
    path: Path
    version: int

    def peak(self) -> int:
        return int((self.path / ("memory.max_usage_in_bytes" if self.version == 1 else "memory.peak")).read_text())

    def oom_kills(self) -> int:
        text = (self.path / ("memory.oom_control" if self.version == 1 else "memory.events")).read_text()
        return int(dict(line.split() for line in text.splitlines()).get("oom_kill", 0))


@contextlib.contextmanager
def memory_cgroup(limit: int) -> Iterator[Cgroup]:
    """A cgroup limited to `limit` bytes, gone at the end. Raises CgroupUnavailable."""
    version = 1 if (V1 / "memory.limit_in_bytes").exists() else 2
    path = (V1 if version == 1 else V2) / f"flashrt-{os.getpid()}-{time.monotonic_ns()}"
    try:
        path.mkdir()
    except OSError as error:
        raise CgroupUnavailable(f"{path} cannot be made: {error.strerror}") from None
    try:
        try:
            if version == 1:
                _limit_v1(path, limit)
            else:
                _limit_v2(path, limit)
        except OSError as error:
            raise CgroupUnavailable(f"the limit of {path} cannot be set: {error.strerror}") from None
        yield Cgroup(path, version)
    finally:
        _remove(path)


def _limit_v1(path: Path, limit: int) -> None:
    (path / "memory.limit_in_bytes").write_text(str(limit))
    with contextlib.suppress(OSError):  # absent where the kernel does not account for swap
        (path / "memory.memsw.limit_in_bytes").write_text(str(limit))


def _limit_v2(path: Path, limit: int) -> None:
    if not (path / "memory.max").exists():
        (path.parent / "cgroup.subtree_control").write_text("+memory")
    (path / "memory.max").write_text(str(limit))
    with contextlib.suppress(OSError):
        (path / "memory.swap.max").write_text("0")


def _remove(path: Path) -> None:
    for _ in range(50):  # the last process may still be on its way out
        try:
            path.rmdir()
        except OSError:
            time.sleep(0.02)
        else:
            return


def run_limited(
    command: Sequence[str], limit: int, *, env: Mapping[str, str] | None = None, timeout: float | None = None
) -> Result:
    """Run `command` within `limit` bytes of memory. Raises subprocess.TimeoutExpired."""
    try:
        with memory_cgroup(limit) as cgroup:
            inside = ["/bin/sh", "-c", ENTER, str(cgroup.path / "cgroup.procs"), *command]
            code, stdout, stderr, rss = _run(inside, env, timeout)
            return Result(code, stdout, stderr, cgroup.peak(), rss, cgroup.oom_kills() > 0, True)
    except CgroupUnavailable as error:
        code, stdout, stderr, rss = _run(list(command), env, timeout)
        return Result(code, stdout, stderr, rss, rss, False, False, str(error))


def _run(command: list[str], env: Mapping[str, str] | None, timeout: float | None) -> tuple[int, str, str, int]:
    peak = 0
    deadline = None if timeout is None else time.monotonic() + timeout
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as child:
        while True:
            peak = max(peak, _high_water_mark(child.pid))
            try:
                stdout, stderr = child.communicate(timeout=SAMPLE_S)
            except subprocess.TimeoutExpired:
                if deadline is not None and time.monotonic() > deadline:
                    child.kill()
                    raise
            else:
                return child.returncode, stdout, stderr, peak


def _high_water_mark(pid: int) -> int:
    """VmHWM of a process; 0 once it is gone."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit-gb", type=float, required=True, help="GiB that the command may hold")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        parser.error("no command given")
    result = run_limited(command, int(args.limit_gb * (1 << 30)))
    report = asdict(result)
    sys.stdout.write(report.pop("stdout"))
    sys.stderr.write(report.pop("stderr"))
    print(json.dumps(report), file=sys.stderr)
    return result.returncode if result.returncode >= 0 else 128 - result.returncode


if __name__ == "__main__":
    sys.exit(main())
