"""Where answers go: a file to which whole lines are added, and from which a run goes on that was killed."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from flashrt.errors import DiskError, UsageError
from flashrt.storage.lock import lock


class Output:
    """`done` maps the lines that are answered to their keys. What is written is on disk when `write` returns."""

    def __init__(self, path: Path) -> None:
        """Cuts off a last line that was not written whole.

        Raises UsageError where another process writes to the file, and for one that holds anything else.
        """
        self.path = path
        try:
            self._handle = lock(path, f"{path} is being written to by another process: wait for its end")
            _sync_folder(path)
        except OSError as error:
            raise UsageError(f"{path} cannot be written: {error.strerror}") from None
        try:
            self.done = self._read()
        except BaseException:
            self._handle.close()
            raise

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.close()

    def write(self, records: Sequence[dict[str, Any]]) -> None:
        """Add a line for each. Raises DiskError."""
        data = memoryview("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
        try:
            while data:
                data = data[os.write(self._handle.fileno(), data) :]
            os.fsync(self._handle.fileno())
        except OSError as error:
            raise DiskError(f"writing {self.path} failed: {error.strerror}") from None

    def _read(self) -> dict[int, str]:
        done, end = {}, 0
        with self.path.open("rb") as handle:
            for data in handle:
                if not data.endswith(b"\n"):
                    break
                end += len(data)
                try:
                    record = json.loads(data)
                    done[int(record["line"])] = str(record["id"])
                except (ValueError, KeyError, TypeError, RecursionError):
                    raise UsageError(f"{self.path} holds what is no answer of a batch: name another file") from None
        os.ftruncate(self._handle.fileno(), end)
        return done


def _sync_folder(path: Path) -> None:
    """A new file has its name once its directory is on disk."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
