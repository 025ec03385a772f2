"""/v1/messages and its count_tokens: Anthropic's form of a conversation, as one that templates read."""

from __future__ import annotations

from typing import Any

import msgspec

from flashrt.server.answers import Usage
from flashrt.server.anthropic_answers import MessageAnswers, MessageShape
from flashrt.server.calls import grammar_of_calls
from flashrt.server.chat import ENDING
from flashrt.server.deltas import style_of
from flashrt.server.desk import Asked
from flashrt.server.errors import ApiError, invalid, refused
from flashrt.server.fields import Refusals, bias_free_sampling, checked_stops, convert
from flashrt.server.job import Part, Rules
from flashrt.server.memory import most_tokens
from flashrt.server.service import Service
from flashrt.server.tools import Function, Tool, Use, shown, use_of

REFUSED: Refusals = {
    "service_tier": ("there is one", ("auto", "standard_only")),
    "container": ("nothing is run", ()),
    "mcp_servers": ("nothing is called", ([],)),
    "output_format": ("use response_format of /v1/chat/completions", ()),
}
_CHOICES = {"auto": "auto", "none": "none", "any": "required"}
_KNOWN = {  # type of a block → its fields; a signature says that nobody changed a thought
    "text": {"type", "text"},
    "tool_result": {"type", "tool_use_id", "content", "is_error"},
    "tool_use": {"type", "id", "name", "input", "caller"},
    "thinking": {"type", "thinking", "signature"},
}
_BESIDE = {"cache_control", "citations"}  # of a block: what is kept is found without being told


class OutputConfig(msgspec.Struct, forbid_unknown_fields=True):
    effort: str | None = None


class Turn(msgspec.Struct, forbid_unknown_fields=True):
    role: str
    content: str | list[dict[str, Any]]


class AnthropicTool(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    type: str | None = None
    cache_control: dict[str, Any] | None = None
    eager_input_streaming: bool | None = None
    strict: bool | None = None


class CountFields(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    model: str
    messages: list[Turn]
    system: str | list[dict[str, Any]] | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: OutputConfig | None = None
    context_management: dict[str, Any] | None = None
    cache_control: dict[str, Any] | None = None


class MessageFields(CountFields, kw_only=True):
    """What changes nothing: who asks, what may be kept of earlier turns, and how much a model should think.

    A model thinks as its template has it; the conversation is taken as it is sent.
    """

    max_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None


def message(service: Service, given: dict[str, Any]) -> Asked:
    """Raises ApiError."""
    fields = convert(given, MessageFields, REFUSED)
    if fields.max_tokens < 1:
        raise invalid("max_tokens", f"max_tokens is {fields.max_tokens}, expected 1 or more")
    prompts, (prompt, use) = service.prompts, _prompt(service, fields)
    most, stops = prompts.limit(prompt, None, "max_tokens"), checked_stops(fields.stop_sequences or [])
    limit = min(fields.max_tokens, most, most_tokens(1, None))  # agents name what their largest model may write
    named = {"temperature": fields.temperature, "top_p": fields.top_p, "top_k": fields.top_k}
    sampling = bias_free_sampling({k: v for k, v in named.items() if v is not None}, service.recommended)
    template = _template(service)
    style = style_of(template, prompts.tokenizer.decode(prompt[-ENDING:], False), use is not None)
    grammar = grammar_of_calls(service.grammars, prompts.tokenizer, template, style, use) if use else None
    parts = [Part(prompt, limit, sampling)]
    service.check_size(parts, None)
    shape = MessageShape(service.name, prompts.tokenizer, style, stops)
    rules = Rules(stops, grammar=grammar)
    return Asked(parts, rules, MessageAnswers(shape, Usage(len(prompt))), bool(fields.stream), False)


def counted(service: Service, given: dict[str, Any]) -> dict[str, Any]:
    """Raises ApiError."""
    prompt, _ = _prompt(service, convert(given, CountFields, REFUSED))
    return {"input_tokens": len(prompt)}


def _prompt(service: Service, fields: CountFields) -> tuple[Any, Use | None]:
    """Tokens of the prompt, and how the tools that it shows may be called."""
    given, choice = [_tool(tool) for tool in fields.tools or []], _choice(fields.tool_choice or {"type": "auto"})
    tools = shown(given, choice if given or fields.tool_choice else None, _template(service))
    conversation = [{"role": "system", "content": _text("system", fields.system)}] if fields.system else []
    for i, turn in enumerate(fields.messages):
        conversation += _turn(f"messages[{i}]", turn)
    if not conversation:
        raise invalid("messages", "messages: none, expected 1 or more")
    prompt = service.prompts.conversation(conversation, **({"tools": tools} if tools else {}))
    several = not (fields.tool_choice or {}).get("disable_parallel_tool_use")
    return prompt, use_of(given, choice, several) if tools else None


def _template(service: Service) -> str:
    return service.prompts.template.source if service.prompts.template else ""


def _tool(tool: AnthropicTool) -> Tool:
    if tool.type not in (None, "custom"):
        raise refused("tools", "tools are the client's own: nothing is looked up or run here")
    return Tool(Function(tool.name, tool.description, tool.input_schema, tool.strict))


def _choice(choice: dict[str, Any]) -> str | dict[str, Any]:
    """In OpenAI's form."""
    kind = str(choice.get("type"))
    if unknown := choice.keys() - {"type", "name", "disable_parallel_tool_use"}:
        raise refused(f"tool_choice.{min(unknown)[:50]}", "a choice is not read so")
    if kind == "tool":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if kind not in _CHOICES:
        raise invalid("tool_choice.type", f"tool_choice.type is {kind!r:.50}, expected auto, none, any or tool")
    return _CHOICES[kind]


def _turn(where: str, turn: Turn) -> list[dict[str, Any]]:
    """A message, those that results of tools are before it."""
    if turn.role not in ("user", "assistant"):
        raise invalid(f"{where}.role", f"{where}.role is {turn.role!r:.50}, expected user or assistant")
    blocks = [{"type": "text", "text": turn.content}] if isinstance(turn.content, str) else turn.content
    found: list[dict[str, Any]] = []
    texts: list[str] = []
    own: dict[str, Any] = {}
    for i, block in enumerate(blocks):
        at, kind = f"{where}.content[{i}]", block.get("type")
        if unknown := block.keys() - _KNOWN.get(str(kind), block.keys()) - _BESIDE:
            raise refused(f"{at}.{min(unknown)[:50]}", "a block of this type is not read so")
        if kind == "text":
            texts.append(_text(at, [block]))
        elif kind == "tool_result" and turn.role == "user":
            content = _text(at, block.get("content") or "")
            if block.get("is_error"):
                content = f"error: {content}"
            found.append({"role": "tool", "tool_call_id": _field(at, block, "tool_use_id", str), "content": content})
        elif kind == "tool_use" and turn.role == "assistant":
            call = {"name": _field(at, block, "name", str), "arguments": _field(at, block, "input", dict)}
            own.setdefault("tool_calls", []).append({"id": block.get("id"), "type": "function", "function": call})
        elif kind == "thinking" and turn.role == "assistant":
            own["reasoning_content"] = own.get("reasoning_content", "") + _field(at, block, "thinking", str)
        else:
            raise refused(f"{at}.type", f"a {turn.role}'s message holds no {kind!r:.50} that the model could read")
    if texts or own or not found:
        found.append({"role": turn.role, "content": "\n".join(texts), **own})
    return found


def _text(where: str, content: Any) -> str:
    """Blocks of text, a line each."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise invalid(where, f"{where}: expected a text, or a list of blocks")
    for block in content:
        if block.get("type") != "text" or block.keys() - {"type", "text"} - _BESIDE:
            raise refused(where, f"the model reads text, not {block.get('type')!r:.50}")
    return "\n".join(_field(where, block, "text", str) for block in content)


def _field(where: str, block: dict[str, Any], name: str, kind: type) -> Any:
    if not isinstance(block.get(name), kind):
        raise ApiError(400, f"{where}.{name} is missing, or no {kind.__name__}", param=f"{where}.{name}")
    return block[name]
