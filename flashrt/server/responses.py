"""/v1/responses: OpenAI's newer form of a conversation, as one of /v1/chat/completions. Nothing is stored."""

from __future__ import annotations

from typing import Any

import msgspec

from flashrt.server.chat import ChatFields, prepared
from flashrt.server.desk import Asked, Desk
from flashrt.server.errors import ApiError, invalid, refused
from flashrt.server.fields import Refusals, StreamOptions, convert
from flashrt.server.formats import JsonSchema, ResponseFormat
from flashrt.server.messages import CalledFunction, Message, ToolCall
from flashrt.server.response_answers import ResponseAnswers
from flashrt.server.tools import Function, Tool

REFUSED: Refusals = {
    "previous_response_id": ("nothing is stored: send the whole conversation", ()),
    "conversation": ("nothing is stored: send the whole conversation", ()),
    "store": ("nothing is stored", (False,)),
    "background": ("nothing is stored: whoever asks has to wait", (False,)),
    "prompt": ("there are no prompts of the server's own", ()),
    "truncation": ("what does not fit is refused", ("disabled",)),
    "max_tool_calls": ("nothing is called here", ()),
    "top_logprobs": ("use /v1/chat/completions", (0,)),
    "service_tier": ("there is one", ("auto", "default", "flex", "priority")),
}
# What a chat calls otherwise.
_NAMES = {
    "max_completion_tokens": "max_output_tokens",
    "messages": "input",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
_TEXTS = ("input_text", "output_text", "text")
_ITEMS = {  # type of an item → its fields
    "message": {"role", "content", "phase"},
    "function_call": {"call_id", "name", "arguments"},
    "function_call_output": {"call_id", "output"},
    "reasoning": {"summary", "content", "encrypted_content"},
}


class TextFormat(msgspec.Struct, forbid_unknown_fields=True):
    type: str
    schema: dict[str, Any] | None = None
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class Text(msgspec.Struct, forbid_unknown_fields=True):
    format: TextFormat | None = None
    verbosity: str | None = None


class Reasoning(msgspec.Struct, forbid_unknown_fields=True):
    """Summaries have no effect: thoughts are told whole."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class ResponseTool(msgspec.Struct, forbid_unknown_fields=True):
    type: str
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseFields(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    model: str
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: Text | None = None
    reasoning: Reasoning | None = None
    include: list[str] | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


def response(desk: Desk, given: dict[str, Any]) -> Asked:
    """Raises ApiError."""
    fields = convert(given, ResponseFields, REFUSED)
    _check(fields)
    try:
        turn = prepared(desk, _chat(fields))
    except ApiError as error:
        raise _renamed(error) from None
    sampling = turn.parts[0].sampling
    said = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_output_tokens": fields.max_output_tokens,
        "parallel_tool_calls": fields.parallel_tool_calls is not False,
        "tool_choice": fields.tool_choice or "auto",
    }
    return Asked(turn.parts, turn.rules, ResponseAnswers(turn.shape, turn.usage, said), bool(fields.stream), False)


def _check(fields: ResponseFields) -> None:
    if unknown := set(fields.include or ()) - {"reasoning.encrypted_content"}:  # thoughts are told as text
        raise refused("include", f"there is no {min(unknown)[:100]} here")
    if fields.text and fields.text.verbosity not in (None, "medium"):
        raise refused("text.verbosity", "say it in a message")
    if fields.stream_options and fields.stream_options.include_usage:
        raise refused("stream_options.include_usage", "the last event of a stream has the usage")


def _renamed(error: ApiError) -> ApiError:
    """By the names that this form has."""
    message, param = error.message, error.param
    for old, new in _NAMES.items():
        message = message.replace(old, new)
        param = param and param.replace(old, new)
    return ApiError(error.status, message, param=param, code=error.code, retry=error.retry)


def _chat(fields: ResponseFields) -> ChatFields:
    return ChatFields(
        model=fields.model,
        messages=_messages(fields),
        tools=[_tool(i, tool) for i, tool in enumerate(fields.tools or [])] or None,
        tool_choice=_choice(fields.tool_choice, bool(fields.tools)),
        parallel_tool_calls=fields.parallel_tool_calls,
        response_format=_format(fields.text.format) if fields.text and fields.text.format else None,
        reasoning_effort=fields.reasoning.effort if fields.reasoning else None,
        max_completion_tokens=fields.max_output_tokens,
        temperature=fields.temperature,
        top_p=fields.top_p,
    )


def _format(form: TextFormat) -> ResponseFormat:
    if (form.type == "json_schema") != (form.schema is not None):
        raise invalid("text.format.schema", "text.format.schema goes with the type json_schema")
    return ResponseFormat(form.type, None if form.schema is None else JsonSchema(form.schema))


def _tool(index: int, tool: dict[str, Any]) -> Tool:
    if tool.get("type") != "function":
        raise refused(f"tools[{index}].type", "tools are the client's own functions: nothing is looked up or run here")
    try:
        found = msgspec.convert(tool, ResponseTool)
    except (msgspec.ValidationError, RecursionError) as error:
        raise invalid(f"tools[{index}]", f"tools[{index}]: {error}") from None
    return Tool(Function(found.name, found.description, found.parameters, found.strict))


def _choice(choice: str | dict[str, Any] | None, tools: bool) -> str | dict[str, Any] | None:
    """Clients say auto of no tools."""
    if choice == "auto" and not tools:
        return None
    if isinstance(choice, dict) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def _messages(fields: ResponseFields) -> list[Message]:
    messages = [Message("system", fields.instructions)] if fields.instructions else []
    if isinstance(fields.input, str):
        return [*messages, Message("user", fields.input)]
    turns = _Turns(messages)
    for i, item in enumerate(fields.input):
        turns.add(f"input[{i}]", item)
    return messages


class _Turns:
    """Messages that grow by items. What an assistant thought, said and called one after the other is one message."""

    def __init__(self, messages: list[Message]) -> None:
        self._messages = messages

    def add(self, where: str, item: dict[str, Any]) -> None:
        kind = str(item.get("type", "message"))
        if kind not in _ITEMS:
            raise refused(f"{where}.type", f"the model reads no {kind!r:.50}")
        if unknown := item.keys() - _ITEMS[kind] - {"type", "id", "status"}:
            raise refused(f"{where}.{min(unknown)[:50]}", "an item of this type is not read so")
        {
            "message": self._message,
            "function_call": self._call,
            "function_call_output": self._output,
            "reasoning": self._thought,
        }[kind](where, item)

    def _message(self, where: str, item: dict[str, Any]) -> None:
        role, text = _string(where, item, "role"), _text(f"{where}.content", item.get("content"))
        last = self._messages[-1] if self._messages else None
        if role == "assistant" and last is not None and last.role == role and not (last.content or last.tool_calls):
            last.content = text
        else:
            self._messages.append(Message(role, text))

    def _call(self, where: str, item: dict[str, Any]) -> None:
        function = CalledFunction(_string(where, item, "name"), _string(where, item, "arguments"))
        message = self._assistant()
        message.tool_calls = [*(message.tool_calls or []), ToolCall(_string(where, item, "call_id"), function)]

    def _output(self, where: str, item: dict[str, Any]) -> None:
        text = _text(f"{where}.output", item.get("output"))
        self._messages.append(Message("tool", text, tool_call_id=_string(where, item, "call_id")))

    def _thought(self, where: str, item: dict[str, Any]) -> None:
        """Of other models' thoughts there may be only a summary, or what they alone can read."""
        content = item.get("content") or []
        if not isinstance(content, list) or not all(
            isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
        ):
            raise invalid(f"{where}.content", f"{where}.content: expected parts with a text")
        if content:
            self._messages.append(Message("assistant", "", "".join(part["text"] for part in content)))

    def _assistant(self) -> Message:
        if not self._messages or self._messages[-1].role != "assistant":
            self._messages.append(Message("assistant", ""))
        return self._messages[-1]


def _string(where: str, item: dict[str, Any], name: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise invalid(f"{where}.{name}", f"{where}.{name} is missing, or no text")
    return value


def _text(where: str, content: Any) -> str:
    """Parts of text, a line each."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise invalid(where, f"{where}: expected a text, or a list of parts")
    for part in content:
        if part.get("type") not in _TEXTS:
            raise refused(where, f"the model reads text, not {part.get('type')!r:.50}")
    return "\n".join(_string(where, part, "text") for part in content)
