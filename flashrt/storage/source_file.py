"""The files that an outline reads weights from, in `source.json` beside its manifest.

They are not in the manifest itself: a model whose file is moved, or touched, stays what it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from flashrt.errors import PackError
from flashrt.storage.atomic import write_atomically
from flashrt.storage.direct import open_direct

SOURCE_FILE = "source.json"


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file as it was when its outline was made."""

    path: str
    nbytes: int
    modified_ns: int
    changed_ns: int
    inode: int
    device: int

    @classmethod
    def of(cls, path: Path) -> SourceFile:
        """Raises OSError."""
        return cls._of(str(path), path.stat())

    @classmethod
    def _of(cls, path: str, stat: os.stat_result) -> SourceFile:
        return cls(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev)

    def open(self) -> tuple[int, bool]:
        """A descriptor, and whether it is O_DIRECT. Raises PackError where the file is not what it was; DiskError."""
        if not os.path.exists(self.path):
            raise PackError(f"{self.path} is missing, whose weights are read from there: name the file where it lies")
        handle, direct = open_direct(Path(self.path))
        try:
            self.check(handle)
        except PackError:
            os.close(handle)
            raise
        return handle, direct

    def check(self, handle: int) -> None:
        """Raises PackError where an open file is not what it was."""
        if self._of(self.path, os.fstat(handle)) != self:
            raise PackError(f"{self.path} has changed since it was opened as a model: run it again")


def read_sources(outline: Path) -> list[SourceFile]:
    """The files that an outline is of. Raises PackError."""
    path = outline / SOURCE_FILE
    try:
        files = [SourceFile(*record) for record in json.loads(path.read_bytes())]
        for file in files:
            if not isinstance(file.path, str) or not all(type(number) is int for number in astuple(file)[1:]):
                raise ValueError("a record of another form")
        return files
    except OSError as error:
        raise PackError(f"{path} cannot be read: {error.strerror}. Name the GGUF file itself") from None
    except (ValueError, TypeError) as error:
        raise PackError(f"{path} is damaged ({error}): name the GGUF file itself") from None


def write_sources(outline: Path, files: Sequence[SourceFile]) -> None:
    """Say which files an outline is of. Raises DiskError."""
    write_atomically(outline / SOURCE_FILE, json.dumps([astuple(file) for file in files]).encode())
