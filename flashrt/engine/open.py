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
from pathlib import Path
from typing import IO, TYPE_CHECKING

from flashrt import errors
from flashrt.errors import CheckpointError, DiskError, FlashrtError, UsageError

if TYPE_CHECKING:
    from flashrt.engine.engine import Engine
    from flashrt.spec import ModelSpec

Progress = Callable[[str, int, int], None]  # what is going on, bytes done, bytes in all

DTYPES = ("f32", "bf16", "int8", "int4")
DEMOS = ("demo", "demo-small")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_IDENTITY_FILES = (".safetensors", ".json", ".jinja", ".txt", ".model")


def default_cache() -> Path:
    """$XDG_CACHE_HOME/flashrt, or ~/.cache/flashrt."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "flashrt"


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
) -> Engine:
    """See `flashrt.load`."""
    from flashrt.config import budget_bytes

    if budget_gb is not None:
        budget_bytes(budget_gb)
    cache = Path(cache_dir) if cache_dir else default_cache()
    pack = resolve(path, cache, dtype)

    from flashrt.budget.planner import Workload
    from flashrt.engine.build import DEFAULT_CONTEXT, Prepared
    from flashrt.engine.runtime import runtime_for

    prepared = Prepared(pack, cache, runtime_for(device, threads, host_budget_gb), budget_gb)
    length = checked_context(prepared.spec, context, DEFAULT_CONTEXT)
    return prepared.engine(prepared.plan(Workload(length)))


def checked_context(spec: ModelSpec, asked: int | None, default: int) -> int:
    """The context to plan for: `asked`, or `default` cut to what the model supports. Raises UsageError."""
    if asked is None:
        return min(default, spec.context)
    if asked < 1:
        raise UsageError(f"the context is {asked} tokens, expected 1 or more")
    if asked > spec.context:
        raise UsageError(f"a context of {asked} tokens was asked for, the model supports at most {spec.context}")
    return asked


def resolve(where: str | Path, cache: Path, dtype: str = "int8", progress: Progress = lambda *_: None) -> Path:
    """The pack that `where` names; a checkpoint is packed into `cache` on first use.

    Raises UsageError for a name that is nothing, CheckpointError or DiskError when packing fails.
    """
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    path = Path(where)
    if str(where) not in DEMOS and path.exists():
        if path.is_dir() and _holds_pack(path):
            return path
        slug, identity = path.resolve().name, _identity(path)
        target = cache / "packs" / f"{_slug(slug.removesuffix('.gguf'))}-{dtype}-{identity[:12]}"
        return _packed(path, target, cache, dtype, progress)
    name = str(where)
    if not is_remote(name):
        raise UsageError(
            f"{where} does not exist: expected a pack, a checkpoint (directory or .gguf file), "
            f"a hub repository (org/name) or one of {', '.join(DEMOS)}"
        )
    # Remote names are looked up once: what was packed under a name is used until `flashrt pull` fetches it again.
    return _packed(name, cache / "packs" / f"{_slug(name.replace('/', '--'))}-{dtype}", cache, dtype, progress)


def is_remote(name: str) -> bool:
    """Whether `name` can only be something to fetch: a demo model, or a hub repository."""
    if name in DEMOS:
        return True
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists() and not Path(name).parent.is_dir()


def _holds_pack(path: Path) -> bool:
    """Whether a directory is a pack, be it unfinished or damaged, rather than a checkpoint."""
    from flashrt.storage.manifest import MANIFEST_FILE
    from flashrt.storage.packer import JOB_FILE

    names = {MANIFEST_FILE, JOB_FILE, "resident.safetensors"}
    return any((path / name).exists() for name in names) and not (path / "config.json").exists()


def _identity(path: Path) -> str:
    """What tells one checkpoint from another without reading it: place, names, sizes, times."""
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in _IDENTITY_FILES)
    digest = hashlib.sha256(str(path.resolve()).encode())
    for file in files:
        with contextlib.suppress(OSError):
            status = file.stat()
            digest.update(f"\n{file.name} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"


def _packed(checkpoint: str | Path, target: Path, cache: Path, dtype: str, progress: Progress) -> Path:
    from flashrt.storage.pack import is_pack

    if is_pack(target):
        return target
    with _locked(target.with_name(target.name + ".lock")) as lock:
        if not is_pack(target):  # another process may have packed it while this one waited
            _pack_in_child(checkpoint, target, cache, dtype, progress, lock)
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


def _pack_in_child(
    checkpoint: str | Path, target: Path, cache: Path, dtype: str, progress: Progress, lock: IO[str]
) -> None:
    command = [sys.executable, "-m", "flashrt.engine.packing", str(checkpoint), str(target), dtype, str(cache)]
    roots = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, roots))}
    failure: FlashrtError | None = None
    with tempfile.TemporaryFile("w+") as complaints:
        # The child inherits the lock: should this process be killed, nobody else starts until the child has gone too.
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=complaints,
            env=environment,
            pass_fds=[lock.fileno()],
            text=True,
        )
        assert child.stdout is not None
        try:
            for line in child.stdout:
                message = json.loads(line)
                if "error" in message:
                    failure = _error(message["error"], message["message"])
                else:
                    progress(message["stage"], message["done"], message["total"])
            code = child.wait()
        except BaseException:
            child.terminate()
            child.wait()
            raise
        complaints.seek(0)
        complaint = complaints.read().strip()
    if failure is not None:
        raise failure
    if code:
        reason = complaint.splitlines()[-1] if complaint else f"it ended with status {code}"
        hint = "; it may have run out of memory" if code == -signal.SIGKILL else ""
        raise CheckpointError(f"packing {checkpoint} failed: {reason}{hint}")


def _error(kind: str, message: str) -> FlashrtError:
    found = getattr(errors, kind, FlashrtError)
    is_error = isinstance(found, type) and issubclass(found, FlashrtError)
    return found(message) if is_error else FlashrtError(message)
