"""Responses: JSON, errors, and streams of events."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from flashrt.server.desk import Asked
from flashrt.server.errors import ApiError
from flashrt.server.job import Event, Failed, Job

SEND_SECONDS = 60.0  # that a client may leave what it was sent unread
PIECE = 64 << 10  # bytes that are handed on at a time
COMMENT = b": still computing\n\n"
DONE = b"data: [DONE]\n\n"


def json_reply(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(data), status, headers, media_type="application/json")


def error_reply(error: ApiError) -> Response:
    return json_reply(error.body(), error.status, error.headers())


async def watch(job: Job, receive: Receive) -> None:
    """Cancel a job once its client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
    job.cancel()


class WholeReply:
    """One JSON object, once everything is there."""

    def __init__(self, asked: Asked, job: Job) -> None:
        self._asked, self._job = asked, job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answers = self._asked.answers
        async with _watched(self._job, receive):
            async for event in self._job.events():
                if isinstance(event, Failed):
                    raise event.error
                for chunk in answers.chunks(event):
                    answers.collect(chunk)
        body = msgspec.json.encode(answers.whole())
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        with contextlib.suppress(TimeoutError, asyncio.TimeoutError):  # a client that reads no more has gone
            for begin in range(0, len(body), PIECE):
                await _send(send, body[begin : begin + PIECE])
            await send({"type": "http.response.body", "body": b""})


class StreamReply:
    """Server-sent events: one for each chunk, comments while nothing comes, and [DONE].

    What fails before anything came is a plain error. `alive`: seconds without a word.
    """

    def __init__(self, asked: Asked, job: Job, alive: float) -> None:
        self._asked, self._job, self._alive = asked, job, alive

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with _watched(self._job, receive):
            events = _or_none(self._job.events(), self._alive)
            first = await anext(events)
            if isinstance(first, Failed):
                raise first.error
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            with contextlib.suppress(TimeoutError, asyncio.TimeoutError):  # a client that reads no more has gone
                begun = b"".join(map(self._data, self._asked.answers.first()))
                await _send(send, begun + b"".join(self._lines(first)))
                async for event in events:
                    await _send(send, b"".join(self._lines(event)))
                await _send(send, self._end())
                await send({"type": "http.response.body", "body": b""})

    def _lines(self, event: Event | None) -> Iterator[bytes]:
        if event is None:
            yield COMMENT
        elif isinstance(event, Failed):
            yield self._data(event.error.body())
        else:
            yield from map(self._data, self._asked.answers.chunks(event))

    def _end(self) -> bytes:
        if self._asked.answers.named:
            return b""
        return (self._data(self._asked.answers.last()) if self._asked.include_usage else b"") + DONE

    def _data(self, chunk: Any) -> bytes:
        name = b"event: " + chunk["type"].encode() + b"\n" if self._asked.answers.named else b""
        return name + b"data: " + msgspec.json.encode(chunk) + b"\n\n"


async def _send(send: Send, body: bytes) -> None:
    if body:
        await asyncio.wait_for(send({"type": "http.response.body", "body": body, "more_body": True}), SEND_SECONDS)


async def _or_none(events: AsyncIterator[Event], seconds: float) -> AsyncIterator[Event | None]:
    """None wherever nothing has come for so long."""
    while True:
        coming = asyncio.ensure_future(anext(events))
        try:
            while not (await asyncio.wait({coming}, timeout=seconds))[0]:
                yield None
            yield coming.result()
        except StopAsyncIteration:
            return
        finally:
            coming.cancel()


@contextlib.asynccontextmanager
async def _watched(job: Job, receive: Receive) -> AsyncIterator[None]:
    """Meanwhile the job is cancelled should its client go; at the end in any case."""
    watcher = asyncio.create_task(watch(job, receive))
    try:
        yield
    finally:
        watcher.cancel()
        job.cancel()
