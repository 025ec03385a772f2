"""Facts of a measurement: the machine, the versions, the commit, the time.

flashrt is imported late: the report on a GPU asks whether there is one before flashrt need be installed.
"""

from __future__ import annotations

import datetime
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("flashrt", "numpy", "torch", "transformers", "tokenizers")


def machine() -> dict[str, Any]:
    """The processor, the cores that may be used, the instruction set that kernels take, memory and platform."""
    from flashrt.machine.process import installed_bytes, usable_cores

    return {
        "cpu": _field("/proc/cpuinfo", "model name"),
        "cores": usable_cores(),
        "isa": _isa(),
        "memory_bytes": installed_bytes(),
        "platform": platform.platform(),
    }


def _isa() -> str | None:
    """What the compiled kernels use; None where they are not compiled."""
    try:
        from flashrt_kernels.cpu import isa
    except ImportError:
        return None
    return isa()


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit(root: Path = ROOT) -> dict[str, Any] | None:
    """Hash of the commit that is checked out, and whether tracked files differ from it; None outside of git."""
    try:
        return {"hash": _git(root, "rev-parse", "HEAD"), "dirty": bool(_git(root, "status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def date() -> str:
    """Now, in UTC, ISO 8601."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def pack(path: Path) -> dict[str, Any]:
    """The model that a pack holds."""
    from flashrt.storage.pack import Pack

    opened = Pack(path)
    manifest = opened.manifest
    return {"model": manifest.name, "dtype": manifest.weights, "pack_bytes": opened.layout.nbytes}


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _field(path: str, name: str) -> str:
    """The first value of a field in a file of 'name: value' lines; empty where there is none."""
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""
