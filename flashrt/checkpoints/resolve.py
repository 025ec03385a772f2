"""From what a user names (a pack, a checkpoint, a hub repository, a demo model) to a pack.

A checkpoint is packed once into the cache directory and found there afterwards. Fetching and packing run in a child
process (`flashrt.checkpoints.pack_job`): what they take must not count against the budget of the run that follows.
"""

from __future__ import annotations

import json
import signal
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashrt import child, errors
from flashrt.checkpoints.cache import OUTLINE, content_target, named_target
from flashrt.checkpoints.content import Progress, remembered_content, weight_files
from flashrt.errors import CheckpointError, CheckpointWarning, FlashrtError, PackError, UsageError
from flashrt.storage.names import AUTO, DEMO_NAMES, DTYPE_NAMES, exists, is_remote


def resolve(
    where: str | Path,
    cache: Path,
    dtype: str = AUTO,
    progress: Progress = lambda *_: None,
    context: int | None = None,
    outline: bool = False,
) -> Path:
    """The pack that `where` names; a checkpoint is packed into `cache` on first use.

    outline: of a GGUF file that is not packed, its outline will do; see `flashrt.storage.file_outline`

    Raises UsageError for a name that is nothing and, before packing, for a `context` that the model does not support;
    CheckpointError or DiskError when packing fails.
    """
    if dtype not in DTYPE_NAMES:
        raise UsageError(f"unknown dtype {dtype!r}: expected one of {', '.join(DTYPE_NAMES)}")
    from flashrt.storage.pack import is_pack

    path, name = Path(where), str(where)
    target: Path | None
    if name not in DEMO_NAMES and exists(path):
        if path.is_dir() and _holds_pack(path):
            return path
        content = remembered_content(path, cache)
        outline = outline and dtype == AUTO
        target = None if content is None else content_target(cache, path, dtype, content)
        if outline and content is not None and target is not None and not is_pack(target):
            target = current_outline(cache, path, content)
    elif is_remote(name):
        outline = False
        target = named_target(cache, name, dtype)
    else:
        raise UsageError(
            f"{where} does not exist: expected a pack, a checkpoint (directory or .gguf file), "
            f"a hub repository (org/name, or org/name:Q4_K_M for one of its GGUF files) or one of "
            f"{', '.join(DEMO_NAMES)}"
        )
    if target is not None and is_pack(target):
        return target
    return _pack_in_child(name, _Job(cache, OUTLINE if outline else dtype, progress, context))


def current_outline(cache: Path, checkpoint: Path, content: str) -> Path | None:
    """The outline of that content, if it says of the checkpoint's files where they lie and when they changed."""
    from flashrt.storage.pack import is_pack
    from flashrt.storage.source_file import SourceFile, read_sources

    target = content_target(cache, checkpoint, OUTLINE, content)
    try:
        current = is_pack(target) and read_sources(target) == list(map(SourceFile.of, weight_files(checkpoint)))
    except (PackError, OSError):
        return None
    return target if current else None


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


def _pack_in_child(checkpoint: str, job: _Job) -> Path:
    """Where the pack is that the child made, or found to be there already."""
    arguments = (checkpoint, job.dtype, str(job.cache), *([] if job.context is None else [str(job.context)]))
    said = in_child("flashrt.checkpoints.pack_job", arguments, f"packing {checkpoint}", job.progress)
    return Path(said["pack"])


def in_child(module: str, arguments: Sequence[str], what: str, progress: Progress) -> dict[str, Any]:
    """Run a module as a child process (see `flashrt.checkpoints.job`); what it says at the end.

    `what` it does is named where it fails without a word. Raises the error that the child names.
    """
    made: dict[str, Any] | None = None
    failure: FlashrtError | None = None
    stray = ""  # what a library printed among the messages
    with tempfile.TemporaryFile("w+", errors="replace") as complaints:
        packer = subprocess.Popen(
            child.command(module, *arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            errors="replace",
        )
        assert packer.stdout is not None
        try:
            for line in packer.stdout:
                message = _message(line)
                if message is None:
                    stray = line.strip() or stray
                elif "pack" in message:
                    made = message
                elif "note" in message:
                    warnings.warn(str(message["note"]), CheckpointWarning, stacklevel=2)
                elif "error" in message:
                    failure = _error(message["error"], message["message"])
                else:
                    progress(message["stage"], message["done"], message["total"])
            code = packer.wait()
        except BaseException:
            packer.terminate()
            packer.wait()
            raise
        complaints.seek(0)
        complaint = complaints.read().strip() or stray
    if failure is not None:
        raise failure
    if code or made is None:
        reason = complaint.splitlines()[-1] if complaint else f"it ended with status {code}"
        hint = "; it may have run out of memory" if code == -signal.SIGKILL else ""
        raise CheckpointError(f"{what} failed: {reason}{hint}")
    return made


def _message(line: str) -> dict[str, Any] | None:
    """What the child says in a line of its output; None when the line is none of its messages."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(message, dict):
        return None
    forms = ({"error", "message"}, {"stage", "done", "total"}, {"note"}, {"pack"})
    return message if any(form <= set(message) for form in forms) else None


def _error(kind: str, message: str) -> FlashrtError:
    found = getattr(errors, kind, FlashrtError)
    is_error = isinstance(found, type) and issubclass(found, FlashrtError)
    return found(message) if is_error else FlashrtError(message)
