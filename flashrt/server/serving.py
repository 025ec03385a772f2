"""Runs the application until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn
from starlette.types import ASGIApp

from flashrt.errors import UsageError
from flashrt.server.memory import most_connections
from flashrt.server.protocol import ImpatientProtocol
from flashrt.server.service import Service

# What uvicorn imports by name once it starts: imported before the process is measured.
MODULES = ("uvicorn.lifespan.off", "uvicorn.loops.asyncio", "uvicorn.protocols.http.h11_impl", "flashrt.server.app")
CUT_SECONDS = 5  # that requests have to end once they were cancelled


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound to an address. Raises UsageError."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, proto)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        raise UsageError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None
    return found


def serve(service: Service, app: ASGIApp, listener: socket.socket, started: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT; then finish what goes on within the grace period, and cut what is left.

    Loading begins once the server listens, so that what serving takes is measured with the process. Raises what loading
    raises.
    """
    config = uvicorn.Config(
        app,
        http=ImpatientProtocol,
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=most_connections(service.options.queue),
        timeout_graceful_shutdown=int(service.options.grace) + CUT_SECONDS,
    )
    server = _Server(config, service)
    service.worker.on_failure = server.stop
    asyncio.run(server.run_until_stopped(listener, started))
    service.queue.close()
    service.queue.cancel()
    service.worker.join()
    service.close()
    if service.worker.failure is not None:
        raise service.worker.failure


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run_until_stopped(self, listener: socket.socket, started: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stop)
        begin = asyncio.create_task(self._begin(started))
        await self.serve(sockets=[listener])
        begin.cancel()

    def stop(self) -> None:
        """From any thread."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it is over already
                self._loop.call_soon_threadsafe(self._stop)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the loop's: uvicorn would raise them again at the end, and the exit status with them."""
        yield

    async def _begin(self, started: Callable[[], None]) -> None:
        while not self.started:
            await asyncio.sleep(0.01)
        started()
        self._service.worker.start()

    def _stop(self) -> None:
        """The first time, let requests end; the second time, end them."""
        assert self._loop is not None
        queue = self._service.queue
        if self.should_exit:
            queue.cancel()
            return
        self.should_exit = True
        queue.close()
        self._loop.call_later(self._service.options.grace, queue.cancel)
