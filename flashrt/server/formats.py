"""response_format: the grammar that an answer has to follow."""

from __future__ import annotations

from typing import Any

import msgspec

from flashrt.engine.grammar import Grammar, Grammars
from flashrt.errors import UsageError
from flashrt.server.errors import invalid, refused

PARAM = "response_format"


class JsonSchema(msgspec.Struct, forbid_unknown_fields=True):
    """`strict` asks for what is done in any case; a schema is followed to the letter, or refused."""

    schema: dict[str, Any]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True):
    type: str
    json_schema: JsonSchema | None = None


def grammar_of(grammars: Grammars | None, asked: ResponseFormat | None) -> Grammar | None:
    """None where any text will do. Raises ApiError."""
    if asked is None or asked.type == "text":
        return None
    if asked.type not in ("json_object", "json_schema"):
        raise invalid(f"{PARAM}.type", f"{PARAM}.type is {asked.type!r:.50}, expected text, json_object or json_schema")
    if (asked.type == "json_schema") != (asked.json_schema is not None):
        raise invalid(f"{PARAM}.json_schema", f"{PARAM}.json_schema goes with the type json_schema")
    if grammars is None:
        raise refused(PARAM, "the model has no token that ends a text")
    try:
        return grammars.json_object() if asked.json_schema is None else grammars.json_schema(asked.json_schema.schema)
    except (UsageError, RecursionError) as error:
        raise invalid(PARAM, f"{PARAM}: {error}") from None
