"""Runs of a benchmark: each a process of its own, within its budget, from a cold page cache where asked."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from tools.run_in_cgroup import Result, run_limited

GIB = 1 << 30
NO_LIMIT = 1 << 50  # bytes: a cgroup that limits nothing still counts


class RunFailed(SystemExit):
    """A run came to nothing; the message has its last words. Ends the benchmark unless it is caught."""

    def __init__(self, message: str, oom_killed: bool = False) -> None:
        super().__init__(message)
        self.oom_killed = oom_killed


def limit_of(budget: str) -> int:
    """Bytes of a budget in GiB, or of 'none'."""
    return NO_LIMIT if budget == "none" else int(float(budget) * GIB)


def gib_of(budget: str) -> float | None:
    return None if budget == "none" else float(budget)


def drop_page_cache() -> None:
    """Make the next run read its files from the disk. Needs root."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def forget(path: Path) -> None:
    """Take a file out of the page cache, which would be charged to nobody's cgroup."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def confined(command: Sequence[str], budget: str) -> tuple[dict[str, Any], Result]:
    """The JSON that a command within a budget prints last, and what became of it. Raises RunFailed."""
    outcome = run_limited(command, limit_of(budget))
    if outcome.returncode != 0:
        last = outcome.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise RunFailed(f"a run at {budget} failed: {last[0]}", outcome.oom_killed)
    return last_json(outcome.stdout), outcome


def without_drafts(prompt: str, tokens: int) -> list[str]:
    """Options of `flashrt run` for exactly so many tokens, one a pass."""
    return ["--raw", "--ignore-eos", "--speculate", "off", "--prompt", prompt, "--max-new-tokens", str(tokens)]


def flashrt_run(pack: Path, budget: str, *options: str) -> dict[str, Any]:
    """The report of `flashrt run` within a budget, and what was seen from outside. Raises RunFailed."""
    command = [*flashrt("run", pack), *options]
    command += [] if budget == "none" else ["--budget-gb", budget]
    began = time.perf_counter()
    report, outcome = confined(command, budget)
    seen = {"wall_s": time.perf_counter() - began, "oom_killed": outcome.oom_killed}
    return report | seen | {"cgroup_peak_bytes": outcome.peak_bytes if outcome.limited else None}


def flashrt_eval(what: str, pack: Path, *options: str) -> dict[str, Any]:
    """The report of `flashrt eval`."""
    done = subprocess.run([*flashrt("eval", what, pack), *options], stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise RunFailed(f"flashrt eval {what} failed on {pack.name}")
    return last_json(done.stdout)


def flashrt(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "flashrt", *map(str, words), "--json"]


def last_json(stdout: str) -> dict[str, Any]:
    """The object on the last line of an output."""
    return dict(json.loads(stdout.splitlines()[-1]))


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process of its own: what one has held would count against the next one's budget."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
        return child.submit(function, *arguments).result()
