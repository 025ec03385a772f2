"""Who computes on an engine: one request at a time."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator

from flashrt.errors import UsageError


class Turns:
    """Requests that take turns. One that begins takes the place of the one before it, within the same thread.

    While a request of a thread goes on, those of other threads are refused: it may go on after each of its tokens.
    A request may be handed to another thread between two tokens.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None  # that last computed for the current request
        # Weakly: a request that nobody holds any more is over.
        self._current: weakref.ref[object] | None = None

    @property
    def current(self) -> object | None:
        """The request that goes on."""
        return None if self._current is None else self._current()

    @contextlib.contextmanager
    def using(self, request: object | None) -> Iterator[None]:
        """Have the engine to oneself, after whoever is computing. Raises UsageError while another thread's goes on."""
        self._check_thread(request)  # at once, where it need not wait to know
        with self._lock:
            self._check_thread(request)
            if request is self.current:
                self._thread = threading.current_thread()
            yield

    def begin(self, request: object | None) -> None:
        """Make `request`, which is using the engine, the current one."""
        self._thread = threading.current_thread()
        self._current = None if request is None else weakref.ref(request)

    def check(self, request: object) -> None:
        """Raises UsageError when another request has begun since."""
        if self.current is not request:
            raise UsageError("another generation has begun on this engine: finish one before starting the next")

    def end(self, request: object) -> None:
        """`request` goes on no more."""
        if self.current is request:
            self._current = None

    def stop(self) -> contextlib.AbstractContextManager[object]:
        """Have the engine to oneself to close it, whoever's request goes on."""
        return self._lock

    def _check_thread(self, request: object | None) -> None:
        current, thread = self.current, self._thread
        theirs = thread is not None and thread is not threading.current_thread() and thread.is_alive()
        if current is not None and current is not request and theirs:
            raise UsageError(
                "another thread's request is going on on this engine: wait for its end, close it, or load a second one"
            )
