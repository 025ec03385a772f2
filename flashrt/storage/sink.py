"""Bytes on their way to a file: a thread hashes and writes them, and waits for the disk, while the next are made."""

from __future__ import annotations

import hashlib
import os
import queue
import threading
from types import TracebackType
from typing import IO

QUEUED = 6  # pieces that wait: what is made meanwhile while the disk takes FLUSH_BYTES
FLUSH_BYTES = 32 << 20  # written pages are pushed to disk in steps of this, so that they never pile up in memory

Piece = bytes | memoryview


class Sink:
    """Writes to `handle` in order; `put` returns before that is done. What fails there is raised by the next call.

    Leaving the block waits until all is on disk, or after an exception drops what waits. `written` counts the bytes
    put; `sha256` is theirs when the block is over.
    """

    def __init__(self, handle: IO[bytes]) -> None:
        self.written = 0
        self._handle, self._digest = handle, hashlib.sha256()
        self._pieces: queue.Queue[Piece | None] = queue.Queue(QUEUED)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="flashrt-write", daemon=True)

    def __enter__(self) -> Sink:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._failure is None:
            self._failure = error  # so that the thread drops what waits
        self._pieces.put(None)
        self._thread.join()
        if error is None:
            self._check()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def put(self, data: Piece) -> None:
        """Take `data`, which must not change any more."""
        self._check()
        self.written += len(data)
        self._pieces.put(data)

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        flushed = written = 0
        while (data := self._pieces.get()) is not None:
            if self._failure is not None:
                continue
            try:
                self._digest.update(data)
                self._handle.write(data)
                written += len(data)
                if written - flushed >= FLUSH_BYTES:
                    _drop_pages(self._handle)
                    flushed = written
            except BaseException as error:
                self._failure = error
        if self._failure is None:
            try:
                _drop_pages(self._handle)
            except BaseException as error:
                self._failure = error


def _drop_pages(handle: IO[bytes]) -> None:
    """Push what was written to disk and out of the page cache."""
    handle.flush()
    os.fdatasync(handle.fileno())
    os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
