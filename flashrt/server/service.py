"""What a server holds: the model's texts, the queue, the worker; and a request once it was read."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

from flashrt.config import Sampling
from flashrt.engine.grammar import Grammars
from flashrt.server import fields as request_fields
from flashrt.server.answers import Usage
from flashrt.server.errors import ApiError, invalid
from flashrt.server.job import Event, Job, Part, Rules
from flashrt.server.memory import RESULT_BYTES, most_prompt_tokens, result_bytes
from flashrt.server.metrics import Metrics
from flashrt.server.options import ServerOptions
from flashrt.server.prompts import Prompts
from flashrt.server.queue import JobQueue
from flashrt.server.worker import Worker

Chunk = dict[str, Any]


class Answers(Protocol):
    """Events of a job as the chunks of a stream, and these as one object."""

    named: bool  # whether each event of a stream has the name of its type, and nothing marks the end
    usage: Usage

    def first(self) -> Iterator[Chunk]:
        """Chunks before any event."""

    def chunks(self, event: Event) -> Iterator[Chunk]:
        """What an event comes to."""

    def last(self) -> Chunk:
        """The chunk that holds the usage."""

    def collect(self, chunk: Chunk) -> None:
        """Keep a chunk for `whole`."""

    def whole(self) -> Chunk:
        """The answer that the chunks are."""


@dataclass(frozen=True)
class Asked:
    """A request that was read and found in order."""

    parts: list[Part]
    rules: Rules
    answers: Answers
    stream: bool
    include_usage: bool


@dataclass
class Service:
    """`name` is the model's own; `recommended` says how its authors would choose tokens, beside what is given."""

    options: ServerOptions
    name: str
    prompts: Prompts
    recommended: Callable[[dict[str, Any]], dict[str, Any]]
    queue: JobQueue
    worker: Worker
    metrics: Metrics
    grammars: Grammars | None  # None: nothing ends a text of this model

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

    def sampling(self, fields: request_fields.Fields) -> Sampling:
        """Raises ApiError."""
        found = request_fields.sampling(fields, self.recommended)
        for token, _ in found.logit_bias:
            if token >= self.prompts.vocab:
                raise invalid("logit_bias", f"logit_bias has {token}, the model knows 0 to {self.prompts.vocab - 1}")
        return found

    def seeded(self, sampling: Sampling, choices: int) -> Iterator[Sampling]:
        """One for each answer: the first with the seed itself, each other with one more."""
        for index in range(choices):
            yield sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + index)

    def check_size(self, parts: list[Part], top_logprobs: int | None) -> None:
        """Refuse what takes more memory to hold or to say than the plan has for it. Raises ApiError."""
        most = most_prompt_tokens(self.prompts.context)
        if sum(len(prompt) for prompt in {id(part.prompt): part.prompt for part in parts}.values()) > most:
            what = f"the prompts have more than {most} tokens together: ask with several requests"
            raise ApiError(400, what, param="prompt", code="too_large")
        if result_bytes(parts, top_logprobs) > RESULT_BYTES:
            raise ApiError(
                400,
                f"the answers may take more than {RESULT_BYTES >> 20} MiB to write: ask for fewer tokens, answers, "
                "prompts or top_logprobs at a time",
                code="too_large",
            )

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
