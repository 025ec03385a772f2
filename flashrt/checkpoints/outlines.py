"""Planning with a hub repository before it is downloaded: the outline of its pack, for as long as it is needed."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flashrt.checkpoints.cache import named_target
from flashrt.checkpoints.resolve import Progress, in_child
from flashrt.errors import DiskError
from flashrt.storage.names import is_repository
from flashrt.storage.pack import is_pack


@dataclass(frozen=True, slots=True)
class Outline:
    """Where an outline lies, and the bytes of the download that it saves."""

    path: Path
    download_bytes: int


@contextlib.contextmanager
def outlined(where: str, cache: Path, dtype: str, progress: Progress) -> Iterator[Outline | None]:
    """The outline of a hub repository's pack; None for all else, for one that is packed, and when nobody can be asked.

    Raises CheckpointError where the repository does not hold what is needed, DiskError for a cache that cannot be
    written.
    """
    if not is_repository(where) or is_pack(named_target(cache, where, dtype)):
        yield None
        return
    try:
        cache.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix="outline-", dir=cache)
    except OSError as error:
        raise DiskError(
            f"the cache directory {cache} cannot be written ({error.strerror}): name another with --cache-dir"
        ) from None
    with folder as out:
        said = in_child("flashrt.checkpoints.outline_job", (where, dtype, out), f"previewing {where}", progress)
        yield None if said["pack"] is None else Outline(Path(said["pack"]), said["download"])
