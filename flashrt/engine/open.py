"""From what a user names (a pack, a checkpoint, a hub repository, a demo model) to a pack, and to an engine.

A checkpoint is packed once into the cache directory and found there afterwards. Fetching and packing run in a child
process (`flashrt.engine.packing`): they take memory that must not count against the budget of the run that follows.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from flashrt import errors
from flashrt.errors import CheckpointError, DiskError, FlashrtError, PackError, UsageError
from flashrt.storage.names import DEMO_NAMES, default_cache, exists, is_remote
from flashrt_kernels.rows import Codec

if TYPE_CHECKING:
    from flashrt.engine.engine import Engine
    from flashrt.spec import ModelSpec

Progress = Callable[[str, int, int], None]  # what is going on, bytes done, bytes in all

_IDENTITY_FILES = (".safetensors", ".json", ".jinja", ".txt", ".model")


def load(
    path: str | Path,
    budget_gb: float | None = None,
    *,
    context: int | None = None,
    dtype: str = "int8",
    cache_dir: str | Path | None = None,
    threads: int | None = None,
    device: str = "cpu",
    host_budget_gb: float | None = None,
    mode: str = "exact",
    max_loss: float | None = None,
    speculate: str | int = "auto",
    draft: str | Path | None = None,
) -> Engine:
    """See `flashrt.load`."""
    from flashrt.budget.planner import Workload
    from flashrt.config import budget_bytes, parse_speculate
    from flashrt.engine.build import DEFAULT_CONTEXT, LoadedPack
    from flashrt.engine.draft import load_draft
    from flashrt.engine.runtime import runtime_for

    # What is asked is checked before a checkpoint is packed, which may take an hour.
    if budget_gb is not None:
        budget_bytes(budget_gb)
    check_mode(mode, max_loss)
    most = parse_speculate(speculate)
    runtime = runtime_for(device, threads, host_budget_gb)
    cache = Path(cache_dir) if cache_dir else default_cache()
    found = resolve(path, cache, dtype, context=context)
    prepared = LoadedPack(pack_for(found, mode, max_loss), cache, runtime, budget_gb)
    length = checked_context(prepared.spec, context, DEFAULT_CONTEXT)
    drafting = None if draft is None else load_draft(draft_pack(draft, most, device), prepared, length)
    engine = prepared.engine(prepared.plan(prepared.drafting(Workload(length), most)))
    engine.drafting = drafting
    return engine


def check_mode(mode: str, max_loss: float | None) -> None:
    """Raises UsageError for a mode that there is not, or a loss that makes no sense with it."""
    if mode not in ("exact", "sparse"):
        raise UsageError(f"unknown mode {mode!r}: expected exact or sparse")
    if max_loss is not None and mode == "exact":
        raise UsageError("--max-loss needs --mode sparse: exact mode loses nothing")
    if max_loss is not None and not 0 < max_loss <= 1:
        raise UsageError(f"the loss allowed is {max_loss}, expected more than 0 and at most 1 (0.02 is 2%)")


def pack_for(found: Path, mode: str, max_loss: float | None) -> Path:
    """The pack that a mode runs, for the pack that a user names. Raises UsageError or PackError; see `sparse_pack`."""
    from flashrt.storage.pack import Pack

    if mode == "sparse":
        return sparse_pack(found, max_loss)
    if Pack(found).manifest.sparsity is not None:
        raise UsageError(f"{found} is a calibrated pack, which leaves out: name {found.parent} and --mode sparse")
    return found


def draft_pack(path: str | Path, max_draft_tokens: int | None, device: str) -> Path:
    """The pack that is to draft. Raises UsageError for what is no pack, and where nothing is drafted."""
    from flashrt.storage.pack import Pack

    if max_draft_tokens == 1:
        raise UsageError("--draft needs drafts: leave --speculate off out")
    if device != "cpu":
        raise UsageError("--draft computes on the CPU only: use --device cpu")
    Pack(path)
    return Path(path)


def sparse_pack(base: Path, max_loss: float | None = None) -> Path:
    """The calibrated pack inside the pack `base`.

    Raises UsageError when it is not calibrated, or for a larger loss than `max_loss`; PackError when what is there was
    calibrated for other weights or by another version.
    """
    from flashrt.storage.manifest import SPARSE_DIR
    from flashrt.storage.pack import Pack, is_pack

    path, exact = base / SPARSE_DIR, Pack(base)
    if any(layer.ffn.experts for layer in exact.spec.layers):
        raise UsageError("a mixture of experts reads what its router names in exact mode already: use --mode exact")
    if not is_pack(path):
        raise UsageError(f"{base} is not calibrated: run `flashrt calibrate {base}` first, or use --mode exact")
    sparsity = Pack(path).manifest.sparsity
    if sparsity is None or sparsity.base != exact.manifest.hash:
        raise PackError(f"{path} was calibrated for another pack than {base}: run `flashrt calibrate {base}` again")
    if max_loss is not None and sparsity.max_loss > max_loss:
        raise UsageError(
            f"{base} was calibrated for a loss of {sparsity.max_loss:.2%}, at most {max_loss:.2%} is allowed: "
            f"run `flashrt calibrate {base} --max-loss {max_loss:g}`"
        )
    return path


def checked_context(spec: ModelSpec, asked: int | None, default: int) -> int:
    """The context to plan for: `asked`, or `default` cut to what the model supports. Raises UsageError."""
    if asked is None:
        return min(default, spec.context)
    if asked < 1:
        raise UsageError(f"the context is {asked} tokens, expected 1 or more")
    if asked > spec.context:
        raise UsageError(f"a context of {asked} tokens was asked for, the model supports at most {spec.context}")
    return asked


def resolve(
    where: str | Path,
    cache: Path,
    dtype: str = "int8",
    progress: Progress = lambda *_: None,
    context: int | None = None,
) -> Path:
    """The pack that `where` names; a checkpoint is packed into `cache` on first use.

    Raises UsageError for a name that is nothing and, before packing, for a `context` that the model does not support;
    CheckpointError or DiskError when packing fails.
    """
    dtypes = [codec.value for codec in Codec]
    if dtype not in dtypes:
        raise UsageError(f"unknown dtype {dtype!r}: expected one of {', '.join(dtypes)}")
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
    with _locked(target.with_name(target.name + ".lock")) as lock:
        if not is_pack(target):  # another process may have packed it while this one waited
            _pack_in_child(checkpoint, target, job, lock)
    return target


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[IO[str]]:
    """Hold a lock file of the cache directory; wait while another process holds it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("a")
    except OSError as error:
        raise DiskError(
            f"the cache directory {path.parent} cannot be written ({error.strerror}): "
            "name another with --cache-dir (in Python: cache_dir=...)"
        ) from None
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle


def _pack_in_child(checkpoint: str | Path, target: Path, job: _Job, lock: IO[str]) -> None:
    arguments = [str(checkpoint), str(target), job.dtype, str(job.cache)]
    arguments += [] if job.context is None else [str(job.context)]
    command = [sys.executable, "-m", "flashrt.engine.packing", *arguments]
    roots = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, roots))}
    failure: FlashrtError | None = None
    stray = ""  # what a library printed among the messages
    with tempfile.TemporaryFile("w+", errors="replace") as complaints:
        # The child inherits the lock: should this process be killed, nobody else starts until the child has gone too.
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=complaints,
            env=environment,
            pass_fds=[lock.fileno()],
            text=True,
            errors="replace",
        )
        assert child.stdout is not None
        try:
            for line in child.stdout:
                message = _message(line)
                if message is None:
                    stray = line.strip() or stray
                elif "error" in message:
                    failure = _error(message["error"], message["message"])
                else:
                    job.progress(message["stage"], message["done"], message["total"])
            code = child.wait()
        except BaseException:
            child.terminate()
            child.wait()
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
