"""From what a user names (a pack, a checkpoint, a hub repository, a demo model) to a pack.

A checkpoint is packed once into the cache directory and found there afterwards. Fetching and packing run in a child
process (`flashrt.checkpoints.pack_job`): what they take must not count against the budget of the run that follows.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from flashrt import child, errors
from flashrt.errors import CheckpointError, DiskError, FlashrtError, UsageError
from flashrt.storage.lock import lock
from flashrt.storage.names import AUTO, DEMO_NAMES, DTYPE_NAMES, exists, is_remote

Progress = Callable[[str, int, int], None]  # what is going on, bytes done, bytes in all

_IDENTITY_FILES = (".safetensors", ".json", ".jinja", ".txt", ".model")


def resolve(
    where: str | Path,
    cache: Path,
    dtype: str = AUTO,
    progress: Progress = lambda *_: None,
    context: int | None = None,
) -> Path:
    """The pack that `where` names; a checkpoint is packed into `cache` on first use.

    Raises UsageError for a name that is nothing and, before packing, for a `context` that the model does not support;
    CheckpointError or DiskError when packing fails.
    """
    if dtype not in DTYPE_NAMES:
        raise UsageError(f"unknown dtype {dtype!r}: expected one of {', '.join(DTYPE_NAMES)}")
    path = Path(where)
    job = _Job(cache, dtype, progress, context)
    if str(where) not in DEMO_NAMES and exists(path):
        if path.is_dir() and _holds_pack(path):
            return path
        slug, identity = path.resolve().name, _identity(path)
        return _packed(path, _target(cache, slug.removesuffix(".gguf"), dtype, identity[:12]), job)
    name = str(where)
    if not is_remote(name):
        raise UsageError(
            f"{where} does not exist: expected a pack, a checkpoint (directory or .gguf file), "
            f"a hub repository (org/name) or one of {', '.join(DEMO_NAMES)}"
        )
    # Remote names are looked up once: what was packed under a name is used, whatever is published there later, until
    # its pack is removed. A run needs no network, and never starts to fetch and pack because a repository changed.
    return _packed(name, _target(cache, name.replace("/", "--"), dtype), job)


@dataclass(frozen=True, slots=True)
class _Job:
    """How to pack what is not packed yet."""

    cache: Path
    dtype: str
    progress: Progress
    context: int | None


def _holds_pack(path: Path) -> bool:
    """Whether a directory is a pack, be it unfinished or damaged, rather than a checkpoint."""
    from flashrt.storage.manifest import MANIFEST_FILE
    from flashrt.storage.packer import JOB_FILE

    names = {MANIFEST_FILE, JOB_FILE, "resident.safetensors"}
    return any(exists(path / name) for name in names) and not exists(path / "config.json")


def _identity(path: Path) -> str:
    """What tells one checkpoint from another without reading it: place, names, sizes, times."""
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in _IDENTITY_FILES)
    digest = hashlib.sha256(os.fsencode(path.resolve()))
    for file in files:
        with contextlib.suppress(OSError):
            status = file.stat()
            digest.update(os.fsencode(f"\n{file.name} {status.st_size} {status.st_mtime_ns}"))
    return digest.hexdigest()


def _target(cache: Path, name: str, *distinctions: str) -> Path:
    """Where a checkpoint's pack is kept. A pack of another format version is another pack."""
    from flashrt.storage.manifest import VERSION

    slug = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"
    return cache / "packs" / "-".join((slug, *distinctions, f"v{VERSION}"))


def _packed(checkpoint: str | Path, target: Path, job: _Job) -> Path:
    from flashrt.storage.pack import is_pack

    if is_pack(target):
        return target
    with _locked(target) as held:
        if not is_pack(target):  # another process may have packed it while this one waited
            _pack_in_child(checkpoint, target, job, held)
    return target


def _locked(target: Path) -> IO[str]:
    """The lock of a pack in the cache directory, held; waits while another process holds it."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return lock(target.with_name(target.name + ".lock"))
    except OSError as error:
        raise DiskError(
            f"the cache directory {target.parent} cannot be written ({error.strerror}): "
            "name another with --cache-dir (in Python: cache_dir=...)"
        ) from None


def _pack_in_child(checkpoint: str | Path, target: Path, job: _Job, held: IO[str]) -> None:
    arguments = [str(checkpoint), str(target), job.dtype, str(job.cache)]
    arguments += [] if job.context is None else [str(job.context)]
    failure: FlashrtError | None = None
    stray = ""  # what a library printed among the messages
    with tempfile.TemporaryFile("w+", errors="replace") as complaints:
        # The child inherits the lock: should this process be killed, nobody else starts until the child has gone too.
        packer = subprocess.Popen(
            child.command("flashrt.checkpoints.pack_job", *arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=complaints,
            pass_fds=[held.fileno()],
            text=True,
            errors="replace",
        )
        assert packer.stdout is not None
        try:
            for line in packer.stdout:
                message = _message(line)
                if message is None:
                    stray = line.strip() or stray
                elif "error" in message:
                    failure = _error(message["error"], message["message"])
                else:
                    job.progress(message["stage"], message["done"], message["total"])
            code = packer.wait()
        except BaseException:
            packer.terminate()
            packer.wait()
            raise
        complaints.seek(0)
        complaint = complaints.read().strip() or stray
    if failure is not None:
        raise failure
    if code:
        reason = complaint.splitlines()[-1] if complaint else f"it ended with status {code}"
        hint = "; it may have run out of memory" if code == -signal.SIGKILL else ""
        raise CheckpointError(f"packing {checkpoint} failed: {reason}{hint}")


def _message(line: str) -> dict[str, Any] | None:
    """What the child says in a line of its output; None when the line is none of its messages."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(message, dict):
        return None
    return message if {"error", "message"} <= set(message) or {"stage", "done", "total"} <= set(message) else None


def _error(kind: str, message: str) -> FlashrtError:
    found = getattr(errors, kind, FlashrtError)
    is_error = isinstance(found, type) and issubclass(found, FlashrtError)
    return found(message) if is_error else FlashrtError(message)
