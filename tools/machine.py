"""What a benchmark says of the machine that it ran on, and how it makes runs start alike."""

from __future__ import annotations

import multiprocessing
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from flashrt.machine.disk import PLAIN_DEPTH, sequential_rate
from flashrt.machine.process import installed_bytes, usable_cores

PLAIN_BLOCK = 4 << 20  # bytes of one read of the plain sequential read


def facts() -> dict[str, Any]:
    return {
        "cpu": _field("/proc/cpuinfo", "model name"),
        "cores": usable_cores(),
        "memory_bytes": installed_bytes(),
        "platform": platform.platform(),
    }


def disk_rates(path: Path) -> tuple[float, float]:
    """Bytes per second of reading a file in order around the page cache: one read in flight, and several."""
    return (
        sequential_rate(path, block=PLAIN_BLOCK),
        sequential_rate(path, block=PLAIN_BLOCK, depth=PLAIN_DEPTH),
    )


def disk_summary(rates: Sequence[tuple[float, float]]) -> dict[str, float]:
    """What the disk gave over a whole benchmark."""
    plain, several = zip(*rates, strict=True)
    return {
        "plain_median": statistics.median(plain),
        "plain_least": min(plain),
        "plain_most": max(plain),
        "several_median": statistics.median(several),
    }


def drop_page_cache() -> None:
    """Make the next run read its files from the disk. Needs root."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process of its own: what one has held would count against the next one's budget."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
        return child.submit(function, *arguments).result()


def _field(path: str, name: str) -> str:
    """The first value of a field in a file of 'name: value' lines; empty where there is none."""
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""
