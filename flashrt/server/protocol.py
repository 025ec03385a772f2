"""HTTP connections that do not wait for ever for the head of a request."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 15.0


class ImpatientProtocol(H11Protocol):
    """uvicorn's, which bounds the time between two requests only. Bodies have their own bound (`intake`)."""

    _head: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head is None:
            self._wait_for_head()

    def handle_events(self) -> None:
        super().handle_events()
        if self._head is not None and self.conn.their_state is not h11.IDLE:
            self._head.cancel()
            self._head = None

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._head is not None:
            self._head.cancel()

    def _wait_for_head(self) -> None:
        if self.conn.their_state is h11.IDLE:
            self._head = self.loop.call_later(HEAD_SECONDS, self.transport.close)
