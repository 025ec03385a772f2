"""A request on its way through the engine: what it asks for, and what comes of it."""

from __future__ import annotations

import asyncio
import threading
import time
from array import array
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from flashrt.config import Sampling
from flashrt.engine.generation import Token
from flashrt.engine.grammar import Grammar
from flashrt.engine.logprobs import Logprobs
from flashrt.engine.report import Outcome
from flashrt.server.errors import ApiError


@dataclass(frozen=True, slots=True)
class Part:
    """One answer. `prompt_logprobs`: how many tokens to name beside each of the prompt; None: none is scored."""

    prompt: array[int]
    limit: int  # new tokens, at most
    sampling: Sampling
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Rules:
    """What all answers of a request have in common; see `Engine.generate`."""

    stops: tuple[str, ...] = ()
    top_logprobs: int | None = None
    ignore_eos: bool = False
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True)
class Scored:
    """The prompt of a part was scored."""

    part: int
    logprobs: list[Logprobs]


@dataclass(frozen=True, slots=True)
class Came:
    """A part has one more token."""

    part: int
    token: Token


@dataclass(frozen=True, slots=True)
class Ended:
    """A part is over. None: nothing was generated, as was asked for."""

    part: int
    report: Outcome | None


@dataclass(frozen=True, slots=True)
class Failed:
    """The job is over, and this is why."""

    error: ApiError


Event = Scored | Came | Ended | Failed


@dataclass(eq=False)
class Job:
    """Parts to be computed one after the other, for `client`. Made on the event loop; a worker emits events."""

    client: str
    parts: list[Part]
    rules: Rules
    deadline: float = field(default_factory=lambda: time.monotonic() + 3600)

    def __post_init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: deque[Event] = deque()
        self._arrived = asyncio.Event()
        self._gone = threading.Event()
        self._left = len(self.parts)

    def cancel(self) -> None:
        """Whoever asked wants no more of it."""
        self._gone.set()

    @property
    def gone(self) -> bool:
        return self._gone.is_set()

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def cancelled(self) -> bool:
        """Whether no other pass should begin."""
        return self.gone or self.late

    def emit(self, event: Event) -> None:
        """From the worker's thread, or any."""
        self._events.append(event)
        try:
            self._loop.call_soon_threadsafe(self._arrived.set)
        except RuntimeError:  # the server is over: nobody listens any more
            self.cancel()

    async def events(self) -> AsyncIterator[Event]:
        """Until the last part has ended, or the job failed."""
        while self._left:
            while not self._events:
                self._arrived.clear()
                await self._arrived.wait()
            event = self._events.popleft()
            self._left -= isinstance(event, Ended)
            yield event
            if isinstance(event, Failed):
                return
