"""What a server holds: the model's texts, the queue, the worker; and a request once it was read."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from flashrt.server import fields as request_fields
from flashrt.server.desk import Asked, Desk
from flashrt.server.errors import ApiError
from flashrt.server.job import Job
from flashrt.server.metrics import Metrics
from flashrt.server.options import ServerOptions
from flashrt.server.queue import JobQueue
from flashrt.server.worker import Worker


@dataclass
class Service(Desk):
    """A desk, and who computes what was read there."""

    options: ServerOptions
    queue: JobQueue
    worker: Worker
    metrics: Metrics

    def __post_init__(self) -> None:
        self._desk = ThreadPoolExecutor(1, "desk")  # one at a time: so requests take bounded memory to read
        self.body_bytes = self.options.longest_body(self.prompts.context)
        self.began = int(time.time())

    @property
    def ready(self) -> bool:
        return self.worker.engine is not None

    async def read(self, read: Callable[[Service, dict[str, Any]], Any], body: bytearray) -> Any:
        """What `read` makes of the JSON object that a body is. Raises ApiError."""

        def at_the_desk() -> Any:
            given = request_fields.decode(body)
            self._check_model(given.get("model"))
            return read(self, given)

        return await asyncio.get_running_loop().run_in_executor(self._desk, at_the_desk)

    def submit(self, asked: Asked, client: str) -> Job:
        """Have a request computed. Raises ApiError where it cannot even wait."""
        if not self.ready:
            raise ApiError(503, "the model is being loaded: ask again later", code="loading", retry=2)
        job = Job(client, asked.parts, asked.rules, time.monotonic() + self.options.seconds)
        self.queue.put(job)
        return job

    def close(self) -> None:
        self._desk.shutdown(cancel_futures=True)

    def _check_model(self, name: Any) -> None:
        if isinstance(name, str) and name not in (self.name, *self.options.names):
            raise ApiError(
                404,
                f"there is no model {name!r:.100}: this one is {self.name!r}",
                param="model",
                code="model_not_found",
            )
