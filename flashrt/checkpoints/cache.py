"""Where packs of checkpoints are kept, and who may write there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import IO

from flashrt.errors import DiskError
from flashrt.storage.lock import lock

PACKS = "packs"  # below the cache directory
OUTLINE = "rows"  # in place of the dtype, of an outline whose weights lie in the file itself
_CONTENT_DIGITS = 16


def named_target(cache: Path, name: str, dtype: str) -> Path:
    """Of what is fetched by name. Names are looked up once: what was packed under a name is used, whatever is published
    there later, until its pack is removed. A run needs no network, and never packs because a repository changed.
    """
    return _target(cache, name.replace("/", "--"), dtype)


def content_target(cache: Path, checkpoint: Path, dtype: str, content: str) -> Path:
    """Of files on this machine: where a pack of the same content lies, whatever its files were called."""
    from flashrt.storage.pack import is_pack

    distinctions = dtype, content[:_CONTENT_DIGITS]
    target = _target(cache, checkpoint.resolve().name.removesuffix(".gguf"), *distinctions)
    others = sorted(target.parent.glob("*" + _ending(*distinctions)))
    return next(filter(is_pack, (target, *others)), target)


def locked(target: Path) -> IO[str]:
    """The lock of a pack in the cache, held; waits while another process holds it. Raises DiskError."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return lock(lock_file(target))
    except OSError as error:
        raise DiskError(
            f"the cache directory {target.parent} cannot be written ({error.strerror}): "
            "name another with --cache-dir (in Python: cache_dir=...)"
        ) from None


def lock_file(target: Path) -> Path:
    """What a process holds while it makes a pack in the cache."""
    return target.with_name(target.name + ".lock")


def _target(cache: Path, name: str, *distinctions: str) -> Path:
    slug = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"
    return cache / PACKS / (slug + _ending(*distinctions))


def _ending(*distinctions: str) -> str:
    """A pack of another format version is another pack."""
    from flashrt.storage.manifest import VERSION

    return "-" + "-".join((*distinctions, f"v{VERSION}"))
