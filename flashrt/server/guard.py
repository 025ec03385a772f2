"""What stands before every route: who may ask, from where, and what a failure says."""

from __future__ import annotations

import hmac
import ipaddress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flashrt.server.errors import ApiError
from flashrt.server.replies import error_reply
from flashrt.server.worker import log_failure

OPEN = ("/", "/health")  # without a key
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]


class Guard:
    """`key`: what clients must show, if anything. `local`: browsers may come by names of this machine only."""

    def __init__(self, app: ASGIApp, key: str | None, local: bool) -> None:
        self._app, self._key, self._local = app, key, local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        async def answer(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message["headers"] = [*message["headers"], *_HEADERS]
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, receive, answer)
        except ApiError as error:
            await error_reply(error)(scope, receive, answer)
        except Exception as error:
            log_failure(error)
            if not begun:
                failure = ApiError(500, "an internal error: the server's log says where", code="internal_error")
                await error_reply(failure)(scope, receive, answer)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if self._local and not _names_this_machine(headers.get("host", "")):
            # A page elsewhere may have its own name resolve to this machine, and then read what it is answered.
            raise ApiError(403, "the Host header names another machine", code="wrong_host")
        if self._key is not None and scope["path"] not in OPEN and not self._shown(headers):
            raise ApiError(401, "no valid key: send it as Authorization: Bearer KEY", code="invalid_api_key")

    def _shown(self, headers: Headers) -> bool:
        assert self._key is not None
        kind, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")
        return hmac.compare_digest(given.encode("utf-8", "replace"), self._key.encode())


def _names_this_machine(host: str) -> bool:
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False
