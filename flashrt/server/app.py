"""The application: routes, and what each does with a request."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from flashrt.server.anthropic import counted, message
from flashrt.server.chat import chat
from flashrt.server.completions import completion
from flashrt.server.desk import Asked
from flashrt.server.errors import ApiError
from flashrt.server.guard import Guard
from flashrt.server.intake import Intake
from flashrt.server.memory import BODIES
from flashrt.server.metrics import CONTENT_TYPE
from flashrt.server.page import page
from flashrt.server.replies import StreamReply, WholeReply, error_reply, json_reply
from flashrt.server.responses import response
from flashrt.server.service import Service
from flashrt.server.status import status
from flashrt.server.tokens import tokenized

Read = Callable[[Service, dict[str, Any]], Any]


def build(service: Service) -> ASGIApp:
    intake = Intake(service.body_bytes, BODIES * service.body_bytes)

    def answering(read: Callable[[Service, dict[str, Any]], Asked]) -> Callable[[Request], Awaitable[ASGIApp]]:
        async def endpoint(request: Request) -> ASGIApp:
            async with intake.body(request) as body:
                asked = await service.read(read, body)
            job = service.submit(asked, request.client.host if request.client else "")
            return StreamReply(asked, job, service.options.alive_seconds) if asked.stream else WholeReply(asked, job)

        return endpoint

    def telling(read: Read) -> Callable[[Request], Awaitable[ASGIApp]]:
        async def endpoint(request: Request) -> ASGIApp:
            async with intake.body(request) as body:
                return json_reply(await service.read(read, body))

        return endpoint

    async def models(request: Request) -> ASGIApp:
        names = [service.name, *service.options.names]
        return json_reply({"object": "list", "data": [_model(service, name) for name in names]})

    async def model(request: Request) -> ASGIApp:
        name = request.path_params["name"]
        if name not in (service.name, *service.options.names):
            raise ApiError(404, f"there is no model {name!r:.100}", param="model", code="model_not_found")
        return json_reply(_model(service, name))

    async def health(request: Request) -> ASGIApp:
        if service.ready:
            return json_reply({"status": "ok"})
        return json_reply({"status": "loading"}, 503, {"Retry-After": "2"})

    async def shown(request: Request) -> ASGIApp:
        return json_reply(status(service))

    the_page = page()

    async def front(request: Request) -> ASGIApp:
        return the_page

    async def metrics(request: Request) -> ASGIApp:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    def route(path: str, endpoint: Callable[[Request], Awaitable[ASGIApp]], method: str) -> Route:
        return Route(path, _Counted(service, path, endpoint), methods=[method])

    routes = [
        route("/v1/chat/completions", answering(chat), "POST"),
        route("/v1/completions", answering(completion), "POST"),
        route("/v1/responses", answering(response), "POST"),
        route("/v1/messages", answering(message), "POST"),
        route("/v1/messages/count_tokens", telling(counted), "POST"),
        route("/tokenize", telling(tokenized), "POST"),
        route("/v1/models", models, "GET"),
        route("/v1/models/{name:path}", model, "GET"),
        route("/health", health, "GET"),
        route("/status", shown, "GET"),
        route("/", front, "GET"),
        route("/metrics", metrics, "GET"),
    ]
    handlers = {HTTPException: _http_error}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    options = service.options
    return Guard(app, options.key, local=options.loopback and options.key is None)


class _Counted:
    """A route whose answers are counted by their status. An ASGI application."""

    def __init__(self, service: Service, path: str, endpoint: Callable[[Request], Awaitable[ASGIApp]]) -> None:
        self._service, self._path, self._endpoint = service, path, endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = 500

        async def counted(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            try:
                reply = await self._endpoint(Request(scope, receive))
                await reply(scope, receive, counted)
            except ApiError as error:
                await error_reply(error)(scope, receive, counted)
        finally:
            self._service.metrics.requests.labels(self._path, status).inc()


def _model(service: Service, name: str) -> dict[str, Any]:
    context = service.prompts.context
    return {"id": name, "object": "model", "created": service.began, "owned_by": "flashrt", "max_model_len": context}


async def _http_error(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    what = {404: "there is no such route", 405: "this route takes another method"}.get(status, "this is no request")
    return error_reply(ApiError(status, what))
