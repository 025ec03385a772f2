"""What a user may name: demo models, hub repositories, files; and where what they stand for is kept.

Imports nothing: a run looks here before it knows whether anything has to be fetched.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from flashrt.errors import UsageError

DEMO_NAMES = ("demo", "demo-small")
AUTO = "auto"  # a quantized file as it is, and int8 where it is not quantized, or in no format that can be kept
DTYPE_NAMES = (AUTO, "f32", "bf16", "int8", "int4")  # what weights are packed as
CHECKPOINTS = "checkpoints"  # below the cache directory: demo models
_REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::([\w.-]+))?")


def default_cache() -> Path:
    """$XDG_CACHE_HOME/flashrt, or ~/.cache/flashrt."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "flashrt"


def exists(path: Path) -> bool:
    """Whether something is at `path`. Raises UsageError when that cannot be told: no permission, too long a name."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a name with a NUL character
        return False
    except OSError as error:
        raise UsageError(f"{path} cannot be opened: {error.strerror}") from None
    return True


def is_repository(name: str) -> bool:
    """Whether `name` is a hub repository, org/name, or one of its GGUF files, org/name:Q4_K_M.

    It is not when the path exists, or could within its directory.
    """
    return _REPOSITORY.fullmatch(name) is not None and not exists(Path(name)) and not exists(Path(name).parent)


def repository_of(name: str) -> tuple[str, str | None]:
    """(org/name, the tag behind a colon or None) of a name that `is_repository`."""
    found = _REPOSITORY.fullmatch(name)
    assert found is not None
    return found[1], found[2]


def is_remote(name: str) -> bool:
    """Whether `name` is something to fetch: a demo model, or a hub repository."""
    return name in DEMO_NAMES or is_repository(name)
