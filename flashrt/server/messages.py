"""Messages of a conversation, from OpenAI's form to what chat templates read."""

from __future__ import annotations

from typing import Any

import msgspec

from flashrt.server.errors import invalid, refused

ROLES = ("system", "developer", "user", "assistant", "tool")
MOST_MESSAGES = 10_000


class CalledFunction(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    arguments: str


class ToolCall(msgspec.Struct, forbid_unknown_fields=True):
    id: str
    function: CalledFunction
    type: str = "function"
    index: int | None = None  # of a call that came in pieces


class Message(msgspec.Struct, forbid_unknown_fields=True):
    """`refusal` and `name` are what OpenAI's clients send back; the first only empty."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    name: str | None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = None


def for_template(messages: list[Message]) -> list[dict[str, Any]]:
    """Raises ApiError, by name, for what no template would be shown."""
    if not 0 < len(messages) <= MOST_MESSAGES:
        raise invalid("messages", f"messages: {len(messages)} of them, expected 1 to {MOST_MESSAGES}")
    return [_message(f"messages[{i}]", message) for i, message in enumerate(messages)]


def _message(where: str, message: Message) -> dict[str, Any]:
    if message.role not in ROLES:
        raise invalid(f"{where}.role", f"{where}.role is {message.role!r:.50}, expected {', '.join(ROLES)}")
    if message.refusal:
        raise refused(f"{where}.refusal", "templates know no refusals")
    if message.name is not None and message.role != "tool":
        raise refused(f"{where}.name", "templates do not show it: write it in the content")
    result: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    if message.role == "assistant":
        result |= _answer(where, message)
    elif message.tool_calls or message.reasoning_content:
        raise invalid(where, f"{where}: only an assistant's message has tool_calls or reasoning_content")
    if message.role == "tool":
        if message.tool_call_id is not None:
            result["tool_call_id"] = message.tool_call_id
        if message.name is not None:
            result["name"] = message.name
    elif message.tool_call_id is not None:
        raise invalid(where, f"{where}: only a tool's message has a tool_call_id")
    content = _content(where, message.content)
    if content is None and "tool_calls" not in result:
        raise invalid(f"{where}.content", f"{where}.content is missing")
    return result | {"content": content or ""}


def _answer(where: str, message: Message) -> dict[str, Any]:
    """What only an assistant's message has. Arguments of calls become objects, as templates expect them."""
    result: dict[str, Any] = {}
    if message.reasoning_content is not None:
        result["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        result["tool_calls"] = [_call(f"{where}.tool_calls[{i}]", call) for i, call in enumerate(message.tool_calls)]
    return result


def _call(where: str, call: ToolCall) -> dict[str, Any]:
    if call.type != "function":
        raise refused(f"{where}.type", "only functions are called")
    try:
        arguments = msgspec.json.decode(call.function.arguments) if call.function.arguments.strip() else {}
    except (msgspec.DecodeError, RecursionError) as error:
        raise invalid(f"{where}.function.arguments", f"{where}.function.arguments is no JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise invalid(f"{where}.function.arguments", f"{where}.function.arguments is no JSON object")
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def _content(where: str, content: str | list[dict[str, Any]] | None) -> str | None:
    """Parts of text as one text, a line each."""
    if not isinstance(content, list):
        return content
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type")
        if kind != "text":
            raise refused(f"{where}.content[{i}].type", f"the model reads text, not {kind!r:.50}")
        if not isinstance(part.get("text"), str) or part.keys() - {"type", "text", "cache_control"}:
            raise invalid(f"{where}.content[{i}]", f"{where}.content[{i}]: expected a type and a text")
        texts.append(part["text"])
    return "\n".join(texts)
