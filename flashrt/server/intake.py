"""Bodies of requests, read within bounds."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.requests import ClientDisconnect, Request

from flashrt.server.errors import ApiError

BODY_SECONDS = 30.0  # that a body may take to arrive


class Intake:
    """Bodies of `longest` bytes at most, and `total` bytes of all that are arriving or being read."""

    def __init__(self, longest: int, total: int) -> None:
        self._longest, self._free = longest, total

    @contextlib.asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[bytearray]:
        """What a request holds, whose memory is taken until the block ends.

        Raises ApiError for what is no JSON, too long or too slow, or where too much is arriving.
        """
        self._check(request)
        body = bytearray()
        try:
            try:
                await asyncio.wait_for(self._fill(body, request), BODY_SECONDS)
            except (TimeoutError, asyncio.TimeoutError):
                raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:.0f} s", code="timeout") from None
            except ClientDisconnect:
                raise ApiError(400, "the body was cut off", code="invalid_json") from None
            yield body
        finally:
            self._free += len(body)

    def _check(self, request: Request) -> None:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # what a page elsewhere may send without being asked for leave
            raise ApiError(415, "the Content-Type is no application/json", code="unsupported_media_type")
        size = request.headers.get("content-length", "")
        if size.isdecimal() and int(size[:20]) > self._longest:
            raise self._too_long()

    async def _fill(self, body: bytearray, request: Request) -> None:
        async for part in request.stream():
            if len(body) + len(part) > self._longest:
                raise self._too_long()
            if len(part) > self._free:
                raise ApiError(503, "too many bodies are arriving: ask again later", code="busy", retry=1)
            self._free -= len(part)
            body += part

    def _too_long(self) -> ApiError:
        return ApiError(413, f"the body is longer than {self._longest} bytes, which is the most", code="too_large")
