"""A generation for event loops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as Items
from concurrent.futures import ThreadPoolExecutor
from typing import TypedDict

from flashrt.engine.generation import Generation, Token
from flashrt.engine.grammar import Grammar
from flashrt.engine.report import Report


class Options(TypedDict, total=False):
    """What `Engine.generate` takes by name."""

    stop: str | Items[str]
    ignore_eos: bool
    reuse: bool
    top_logprobs: int | None
    cancelled: Callable[[], bool]
    grammar: Grammar | None


class AsyncGeneration:
    """Yields tokens as a `Generation` does, to `async for`; a thread of its own computes them.

    A task that is cancelled while it waits for a token ends the generation before its next pass, and so does `aclose`.
    Leaving an `async for` early does not: close it, or drop it.
    """

    def __init__(self, begin: Callable[..., Generation], options: Options) -> None:
        """begin: makes the generation, given `options`. Raises what it raises."""
        self._left = False
        asked = options.get("cancelled", lambda: False)
        self._generation = begin(**(options | {"cancelled": lambda: self._left or asked()}))
        self._thread = ThreadPoolExecutor(1, "flashrt")

    def __aiter__(self) -> AsyncIterator[Token]:
        return self

    async def __anext__(self) -> Token:
        loop = asyncio.get_running_loop()
        try:
            token = None if self._left else await loop.run_in_executor(self._thread, next, self._generation, None)
        except BaseException:
            self._leave()
            raise
        if token is None:
            self._leave()
            raise StopAsyncIteration
        return token

    async def aclose(self) -> None:
        """Stop early, after the token that is being computed; the report is there when this returns."""
        self._leave()
        await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)

    @property
    def report(self) -> Report:
        """The figures. Raises RuntimeError while the generation is going on."""
        return self._generation.report

    def _leave(self) -> None:
        """Nothing more is wanted. The thread ends when it has closed the generation."""
        if not self._left:
            self._left = True
            self._thread.submit(self._generation.close)
            self._thread.shutdown(wait=False)

    def __del__(self) -> None:
        if hasattr(self, "_thread"):
            self._leave()
