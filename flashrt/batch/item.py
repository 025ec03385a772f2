"""What one line of a batch asks for, or why it cannot be answered."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flashrt.batch.lines import Line
from flashrt.errors import UsageError
from flashrt.server.chat import chat
from flashrt.server.completions import completion
from flashrt.server.desk import Asked, Desk
from flashrt.server.errors import ApiError, invalid, refused
from flashrt.server.fields import decode

ROUTES: Mapping[str, Callable[[Desk, dict[str, Any]], Asked]] = {
    "/v1/chat/completions": chat,
    "/v1/completions": completion,
}
KNOWN = ("custom_id", "method", "url", "body")
LONGEST_ID = 512  # characters of a custom_id


@dataclass(frozen=True, slots=True)
class Item:
    """A line that was read: `asked`, or an `error`."""

    line: Line
    custom_id: str | None
    asked: Asked | None
    error: ApiError | None

    @property
    def identity(self) -> str:
        """The same in every run."""
        return identity(self.line)

    @property
    def tokens(self) -> int:
        """Of its longest answer with the prompt, at most."""
        return max((len(part.prompt) + part.limit for part in self.asked.parts), default=0) if self.asked else 0

    def record(self, status: int, body: dict[str, Any]) -> dict[str, Any]:
        """The line of an answer."""
        response = {"status_code": status, "request_id": self.identity, "body": body}
        return self._record() | {"response": response, "error": None}

    def failure(self, error: ApiError) -> dict[str, Any]:
        """The line in the place of an answer."""
        body = error.body()
        response = {"status_code": error.status, "request_id": self.identity, "body": body}
        said = {"code": error.code or error.kind, "message": error.message}
        return self._record() | {"response": response, "error": said}

    def _record(self) -> dict[str, Any]:
        return {"id": self.identity, "custom_id": self.custom_id, "line": self.line.number}


def identity(line: Line) -> str:
    return f"batch_req_{line.key}"


class Reader:
    """Reads lines for a model that answers to `names`. A custom_id is taken once."""

    def __init__(self, desk: Desk, names: Sequence[str]) -> None:
        self._desk, self._names = desk, (desk.name, *names)
        self._ids: dict[str, int] = {}

    def request(self, line: Line) -> Item:
        """Of a line in OpenAI's format."""
        custom_id = None
        try:
            given = decode(_whole(line))
            found = given.get("custom_id")
            custom_id = found if isinstance(found, str) and 0 < len(found) <= LONGEST_ID else None
            if custom_id is None:
                raise invalid("custom_id", f"custom_id: expected a text of 1 to {LONGEST_ID} characters")
            first = self._ids.setdefault(custom_id, line.number)
            if first != line.number:
                raise invalid("custom_id", f"custom_id is that of line {first} too: each names one request")
            return self._item(line, custom_id, lambda: self._asked(line, given))
        except ApiError as error:
            return Item(line, custom_id, None, error)

    def known(self, line: Line) -> None:
        """Note the custom_id of a line that was answered by an earlier run."""
        try:
            found = json.loads(line.data or b"").get("custom_id")
        except (ValueError, AttributeError, RecursionError):
            return
        if isinstance(found, str):
            self._ids.setdefault(found, line.number)

    def prompt(self, line: Line, body: Mapping[str, Any], chats: bool | None) -> Item:
        """Of a line that is a prompt: asked as one message, or gone on with; `body` says how.

        chats: None asks where the model has a template
        """
        chats = self._desk.prompts.template is not None if chats is None else chats

        def asked() -> Asked:
            try:
                text = _whole(line).decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise ApiError(400, f"the line is not UTF-8 text: {error.reason}", code="invalid_value") from None
            given = {"messages": [{"role": "user", "content": text}]} if chats else {"prompt": text}
            route = chat if chats else completion
            return route(self._desk, _seeded(line, {"model": self._desk.name, **given, **body}))

        return self._item(line, f"line-{line.number}", asked)

    def _item(self, line: Line, custom_id: str, asked: Callable[[], Asked]) -> Item:
        try:
            return Item(line, custom_id, asked(), None)
        except ApiError as error:
            return Item(line, custom_id, None, error)
        except UsageError as error:
            return Item(line, custom_id, None, ApiError(400, str(error), code="invalid_value"))

    def _asked(self, line: Line, given: dict[str, Any]) -> Asked:
        """Raises ApiError."""
        if unknown := [name for name in given if name not in KNOWN]:
            raise ApiError(400, f"unknown field {unknown[0]!r:.100}", param=unknown[0][:100], code="unknown_parameter")
        if given.get("method") != "POST":
            raise invalid("method", f"method is {given.get('method')!r:.50}, expected POST")
        route, body = ROUTES.get(str(given.get("url"))), given.get("body")
        if route is None:
            raise invalid("url", f"url is {given.get('url')!r:.100}, expected {' or '.join(ROUTES)}")
        if not isinstance(body, dict):
            raise invalid("body", "body: expected an object")
        name = body.get("model")
        if isinstance(name, str) and name not in self._names:
            raise ApiError(
                404,
                f"there is no model {name!r:.100}: this one is {self._desk.name!r} (`--name` adds names)",
                param="model",
                code="model_not_found",
            )
        asked = route(self._desk, _seeded(line, body))
        if asked.stream:
            raise refused("stream", "answers of a batch come whole")
        if any(part.prompt_logprobs is not None for part in asked.parts):
            raise refused("echo", "log-probabilities of prompts are for `flashrt serve`")
        return asked


def _whole(line: Line) -> bytes:
    """Raises ApiError."""
    if line.data is None:
        raise ApiError(400, "the line is too long for the context: shorten it", code="too_large")
    return line.data


def _seeded(line: Line, body: dict[str, Any]) -> dict[str, Any]:
    """With a seed of the line's own, where none is given: another run draws the same."""
    return body if body.get("seed") is not None else body | {"seed": int(line.key[:8], 16)}
