"""/tokenize: the tokens of a text, or of the prompt of a conversation."""

from __future__ import annotations

from typing import Any

import msgspec

from flashrt.server.errors import invalid
from flashrt.server.fields import convert
from flashrt.server.messages import Message, for_template
from flashrt.server.service import Service


class TokenizeFields(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None


def tokenized(service: Service, given: dict[str, Any]) -> dict[str, Any]:
    """Raises ApiError."""
    fields, prompts = convert(given, TokenizeFields, {}), service.prompts
    if (fields.prompt is None) == (fields.messages is None):
        raise invalid("prompt", "expected either a prompt or messages")
    if fields.messages is not None:
        ids = prompts.conversation(for_template(fields.messages))
    else:
        ids = prompts.text(fields.prompt or "")
    return {"tokens": ids.tolist(), "count": len(ids), "max_model_len": prompts.context}
