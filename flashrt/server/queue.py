"""Jobs that wait for the engine: a limit, and turns by client."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque

from flashrt.server.errors import ApiError
from flashrt.server.job import Job

LONGEST_RETRY = 60  # seconds


class JobQueue:
    """At most `limit` jobs. Clients take turns: whoever has many waiting does not keep others from their first."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: OrderedDict[str, deque[Job]] = OrderedDict()  # the next client first
        self._changed = threading.Condition()
        self._running: Job | None = None
        self._closed = False
        self._seconds = 1.0  # that a job took, lately

    @property
    def length(self) -> int:
        with self._changed:
            return sum(map(len, self._waiting.values()))

    @property
    def running(self) -> int:
        """1 while a job is computed."""
        return int(self._running is not None)

    def put(self, job: Job) -> None:
        """Raises ApiError where too many wait, or the server stops."""
        with self._changed:
            if self._closed:
                raise ApiError(503, "the server is stopping", code="stopping", retry=LONGEST_RETRY)
            self._forget_gone()
            waiting = sum(map(len, self._waiting.values()))
            if waiting >= self._limit and (waiting or self._running):
                retry = max(1, min(LONGEST_RETRY, round(self._seconds * (waiting + 1))))
                raise ApiError(429, f"{waiting} requests wait already: ask again later", code="queue_full", retry=retry)
            self._waiting.setdefault(job.client, deque()).append(job)
            self._changed.notify()

    def _forget_gone(self) -> None:
        """Jobs whose clients have gone wait no more, and keep nobody from waiting."""
        for client, jobs in list(self._waiting.items()):
            left = deque(job for job in jobs if not job.gone)
            if left:
                self._waiting[client] = left
            else:
                del self._waiting[client]

    def take(self) -> Job | None:
        """The next job, once there is one; None once the queue is closed and empty."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            if not self._waiting:
                return None
            client, jobs = self._waiting.popitem(last=False)
            job = jobs.popleft()
            if jobs:
                self._waiting[client] = jobs
            self._running = job
            return job

    def done(self, seconds: float) -> None:
        """The job that was taken last is over."""
        with self._changed:
            self._running = None
            self._seconds += 0.3 * (seconds - self._seconds)

    def close(self) -> None:
        """Take no more; what waits is still computed."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def cancel(self) -> None:
        """End what waits and what runs."""
        with self._changed:
            jobs = [job for each in self._waiting.values() for job in each]
            for job in [*jobs, *([self._running] if self._running else [])]:
                job.cancel()
