"""Who computes on an engine: one request at a time."""

from __future__ import annotations

import contextlib
import gc
import itertools
import threading
import weakref
from collections import deque
from collections.abc import Iterator

from flashrt.errors import UsageError

# How often those who wait look whether a request was dropped, or its thread ended: nobody tells them.
LOOK_S = 0.05
COLLECT_LOOKS = 20


class Turns:
    """Requests that take turns. One that begins takes the place of the one before it, within the same thread.

    Those of other threads wait, first come first served, until that thread's request is over: ended, closed, held by
    nobody any more, or left behind by a thread that has ended. A request may be handed to another thread between two
    tokens.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._over = threading.Condition(self._lock)
        self._waiting: deque[object] = deque()
        self._inside: threading.Thread | None = None  # that has the engine just now
        self._thread: threading.Thread | None = None  # that last computed for the current request
        # Weakly: a request that nobody holds any more is over.
        self._current: weakref.ref[object] | None = None

    @property
    def current(self) -> object | None:
        """The request that goes on."""
        return None if self._current is None else self._current()

    @contextlib.contextmanager
    def using(self, request: object | None) -> Iterator[None]:
        """Have the engine to oneself, after whoever is computing, and after other threads' requests."""
        with self._lock:
            outer = self._inside
            if outer is not threading.current_thread():
                self._wait(request)
            if request is self.current:
                self._thread = threading.current_thread()
            self._inside = threading.current_thread()
            try:
                yield
            finally:
                self._inside = outer

    def begin(self, request: object | None) -> None:
        """Make `request`, which is using the engine, the current one."""
        self._thread = threading.current_thread()
        self._current = None if request is None else weakref.ref(request)

    def check(self, request: object) -> None:
        """Raises UsageError when another request has begun since."""
        if self.current is not request:
            raise UsageError("another generation has begun on this engine: finish one before starting the next")

    def end(self, request: object) -> None:
        """`request` goes on no more. Never waits: the garbage collector may end one, in any thread."""
        if self.current is request:
            self._current = None
        if self._lock.acquire(blocking=False):
            self._over.notify_all()
            self._lock.release()

    def stop(self) -> contextlib.AbstractContextManager[object]:
        """Have the engine to oneself to close it, whoever's request goes on."""
        return self._lock

    def _wait(self, request: object | None) -> None:
        mine = self.current is not None and self._thread is threading.current_thread()
        if mine or (request is not None and request is self.current):
            return
        if not self._waiting and not self._taken():
            return
        ticket = object()
        self._waiting.append(ticket)
        try:
            for look in itertools.count(1):
                if not self._taken() and self._waiting[0] is ticket:
                    break
                if look % COLLECT_LOOKS == 0:
                    gc.collect()  # a generation and its frame hold each other, when nobody else does
                self._over.wait(LOOK_S)
        finally:
            self._waiting.remove(ticket)
            self._over.notify_all()

    def _taken(self) -> bool:
        """Whether a request of another thread goes on."""
        thread = self._thread
        theirs = thread is not None and thread is not threading.current_thread() and thread.is_alive()
        return theirs and self.current is not None
