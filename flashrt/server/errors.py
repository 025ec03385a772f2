"""What goes wrong, as OpenAI's clients expect to be told."""

from __future__ import annotations

from typing import Any

from flashrt.errors import FlashrtError, UsageError

LONGEST_MESSAGE = 400  # characters: a message may quote what a client sent
_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is an error object: `status` of HTTP, `param` the field at fault, `code` a word for programs."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry: int | None = None
    ) -> None:
        """retry: seconds after which asking again makes sense"""
        super().__init__(message)
        self.status, self.param, self.code, self.retry = status, param, code, retry
        self.message = message if len(message) <= LONGEST_MESSAGE else message[:LONGEST_MESSAGE] + "..."

    @property
    def kind(self) -> str:
        return _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        fields = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"type": "error", "error": fields}  # the type is Anthropic's

    def headers(self) -> dict[str, str]:
        return {} if self.retry is None else {"Retry-After": str(self.retry)}


def refused(param: str, why: str) -> ApiError:
    """Of a parameter that is known and not supported."""
    return ApiError(400, f"{param} is not supported: {why}", param=param, code="unsupported_parameter")


def invalid(param: str | None, what: str) -> ApiError:
    return ApiError(400, what, param=param, code="invalid_value")


def too_long(what: str) -> ApiError:
    return ApiError(400, what, param="messages", code="context_length_exceeded")


def of_engine(error: FlashrtError) -> ApiError:
    """A client's fault says what is wrong; that of a disk or a pack names files, which are no business of clients."""
    if isinstance(error, UsageError):
        return ApiError(400, str(error), code="invalid_value")
    return ApiError(500, "the model cannot be computed: the server's log says why", code="engine_error")
