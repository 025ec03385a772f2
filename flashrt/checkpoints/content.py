"""What tells one checkpoint from another: the content of its files, wherever they lie and whenever they were touched.

Reading a large checkpoint takes seconds to minutes, so what was found is remembered by the place of its files, with
their sizes, times and numbers: as long as these stay, nothing is read again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from flashrt.errors import CheckpointError, DiskError
from flashrt.storage.atomic import write_atomically
from flashrt.storage.gguf_files import only_gguf, part_names

KNOWN = "known"  # below the cache directory
CHUNK_BYTES = 8 << 20
THREADS = 4  # hashing is as fast as a disk only on several cores
_FORM = 1  # of what is remembered
_SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".model")

Progress = Callable[[str, int, int], None]  # what is going on, bytes done, bytes in all


def content_of(path: Path, cache: Path, progress: Progress = lambda *_: None) -> str:
    """SHA-256 of a checkpoint's files, names included but for that of a GGUF file. Raises CheckpointError."""
    try:
        files = weight_files(path)
        stats = _stats(files)
        if (known := _noted(_note(path, cache), stats)) is not None:
            return known
        content = _read(files, progress)
        if _stats(files) == stats:  # nobody wrote to them meanwhile
            _remember(_note(path, cache), stats, content)
        return content
    except OSError as error:
        raise CheckpointError(f"cannot read {error.filename or path}: {error.strerror}") from error


def remembered_content(path: Path, cache: Path) -> str | None:
    """What `content_of` would return, where it needs to read nothing for it. Raises CheckpointError."""
    try:
        return _noted(_note(path, cache), _stats(weight_files(path)))
    except OSError as error:
        raise CheckpointError(f"cannot read {error.filename or path}: {error.strerror}") from error


def _note(path: Path, cache: Path) -> Path:
    return cache / KNOWN / f"{hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()[:32]}.json"


def weight_files(path: Path) -> list[Path]:
    """The files that say what a checkpoint is."""
    path = Path(os.path.abspath(path))  # a link's own name says which parts a file has
    if path.is_dir():
        gguf = only_gguf(path)
        if gguf is None:
            return sorted(found for found in path.iterdir() if found.suffix in _SUFFIXES and found.is_file())
        path = path / gguf
    return [part for name in part_names(path.name) if (part := path.with_name(name)).is_file()] or [path]


def _stats(files: Sequence[Path]) -> list[list[str | int]]:
    """What changes when a file is written to, or another takes its place."""
    found = [(str(file), file.stat()) for file in files]
    return [[name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev] for name, s in found]


def _noted(note: Path, stats: list[list[str | int]]) -> str | None:
    try:
        known = json.loads(note.read_bytes())
        fits = known["form"] == _FORM and known["files"] == stats
        return str(known["content"]) if fits else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remember(note: Path, stats: list[list[str | int]], content: str) -> None:
    record = {"form": _FORM, "files": stats, "content": content}
    with contextlib.suppress(OSError, DiskError):  # a cache that cannot be written is said where a pack is
        note.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(note, json.dumps(record).encode())


def _read(files: Sequence[Path], progress: Progress) -> str:
    from concurrent.futures import ThreadPoolExecutor

    whole, done = hashlib.sha256(), 0
    total = sum(file.stat().st_size for file in files)
    gguf = any(file.suffix not in _SUFFIXES for file in files)
    for file in files:
        size = file.stat().st_size
        whole.update(os.fsencode(f"{'' if gguf else file.name} {size}\n"))
        descriptor = os.open(file, os.O_RDONLY)
        try:
            with ThreadPoolExecutor(THREADS) as pool:
                for digest in pool.map(lambda at, fd=descriptor: _chunk(fd, at), range(0, size, CHUNK_BYTES)):
                    whole.update(digest)
                    done = min(done + CHUNK_BYTES, total)
                    progress("reading", done, total)
        finally:
            os.close(descriptor)
    return whole.hexdigest()


def _chunk(descriptor: int, at: int) -> bytes:
    return hashlib.sha256(os.pread(descriptor, CHUNK_BYTES, at)).digest()
