"""/v1/chat/completions: conversations in the model's own template."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from flashrt.engine.generation import Token
from flashrt.server.answers import Usage, chat_logprob, finish_of
from flashrt.server.calls import grammar_of_calls
from flashrt.server.deltas import Deltas, Style, silent_marks, style_of
from flashrt.server.desk import Asked, Desk
from flashrt.server.errors import invalid, refused
from flashrt.server.fields import Fields, Refusals, convert
from flashrt.server.formats import ResponseFormat, grammar_of
from flashrt.server.job import Came, Ended, Event, Part, Rules
from flashrt.server.memory import most_tokens
from flashrt.server.messages import Message, for_template
from flashrt.server.tools import Tool, shown, use_of
from flashrt.text.tokenizer import Tokenizer

GIVEN = ("messages", "tools", "add_generation_prompt")  # of a template: what the request itself says
ENDING = 16  # tokens of a prompt that say whether it has opened a thought

REFUSED: Refusals = {
    "audio": ("the model writes text", ()),
    "modalities": ("the model writes text", (["text"],)),
    "functions": ("they were replaced by tools", ([],)),
    "function_call": ("it was replaced by tool_choice", ("none",)),
    "prediction": ("drafts need no prediction", ()),
    "web_search_options": ("nothing is looked up", ()),
    "store": ("nothing is stored", (False,)),
    "service_tier": ("there is one", ("auto", "default", "flex", "priority")),
    "verbosity": ("say it in a message", ("medium",)),
}


class ChatFields(Fields, kw_only=True):
    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def chat(desk: Desk, given: dict[str, Any]) -> Asked:
    """Raises ApiError."""
    fields = convert(given, ChatFields, REFUSED)
    turn = prepared(desk, fields)
    answers = ChatAnswers(turn.shape, turn.usage)
    return Asked(turn.parts, turn.rules, answers, bool(fields.stream), fields.include_usage)


@dataclass(frozen=True)
class Turn:
    """What is computed for a request, and what its answers are made of."""

    parts: list[Part]
    rules: Rules
    shape: Shape
    usage: Usage


def prepared(desk: Desk, fields: ChatFields) -> Turn:
    """Raises ApiError."""
    top = _top(fields)
    template = desk.prompts.template.source if desk.prompts.template else ""
    tools = shown(fields.tools, fields.tool_choice, template)
    grammar = grammar_of(desk.grammars, fields.response_format)
    if tools and grammar:
        raise invalid("response_format", "response_format leaves no room for calls: leave tools out, or it")
    variables = _variables(fields, template) | ({"tools": tools} if tools else {})
    prompt = desk.prompts.conversation(for_template(fields.messages), **variables)
    asked, name = _limit(fields)
    limit = desk.prompts.limit(prompt, asked, name)
    if asked is None:
        limit = min(limit, most_tokens(fields.choices, top))
    parts = [Part(prompt, limit, sampling) for sampling in desk.seeded(desk.sampling(fields), fields.choices)]
    desk.check_size(parts, top)
    tokenizer = desk.prompts.tokenizer
    style = Style() if grammar else style_of(template, tokenizer.decode(prompt[-ENDING:], False), bool(tools))
    if tools:
        use = use_of(fields.tools or [], fields.tool_choice, fields.parallel_tool_calls is not False)
        grammar = grammar_of_calls(desk.grammars, tokenizer, template, style, use)
    shape = Shape(desk.name, tokenizer, fields.choices, top is not None, style)
    return Turn(parts, Rules(fields.stops, top, bool(fields.ignore_eos), grammar), shape, Usage(len(prompt)))


def _variables(fields: ChatFields, template: str) -> dict[str, Any]:
    """What a request sets of the model's template. Raises ApiError for what that does not read."""
    given = dict(fields.chat_template_kwargs or {})
    if fields.reasoning_effort is not None:
        given["reasoning_effort"] = fields.reasoning_effort
    for name in given:
        if name in GIVEN or not name.isidentifier() or not re.search(rf"\b{name}\b", template):
            raise refused(name[:100], "the model's chat template reads no such variable of a request")
    return given


def _top(fields: ChatFields) -> int | None:
    if fields.top_logprobs is not None and not fields.logprobs:
        raise invalid("top_logprobs", "top_logprobs goes with logprobs: true")
    if fields.top_logprobs is not None and not 0 <= fields.top_logprobs <= 20:
        raise invalid("top_logprobs", f"top_logprobs is {fields.top_logprobs}, expected 0 to 20")
    return (fields.top_logprobs or 0) if fields.logprobs else None


def _limit(fields: ChatFields) -> tuple[int | None, str]:
    """Tokens of the answer, at most, and the parameter that says so."""
    old, new = fields.max_tokens, fields.max_completion_tokens
    if None not in (old, new) and old != new:
        raise invalid("max_tokens", f"max_tokens is {old} and max_completion_tokens {new}: give one of them")
    name = "max_tokens" if new is None else "max_completion_tokens"
    limit = old if new is None else new
    if limit == 0:
        raise invalid(name, f"{name} is 0, expected 1 or more")
    return limit, name


@dataclass(frozen=True)
class Shape:
    """What answers are made of: `choices` of them, in a style."""

    name: str
    tokenizer: Tokenizer
    choices: int
    logprobs: bool
    style: Style


@dataclass
class Whole:
    """One answer, as its chunks come."""

    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[Any] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    finish: str | None = None


class ChatAnswers:
    """See `desk.Answers`."""

    named = False

    def __init__(self, shape: Shape, usage: Usage) -> None:
        self.usage = usage
        self._shape = shape
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": shape.name}
        self._whole = {index: Whole() for index in range(shape.choices)}
        self._deltas = {index: Deltas(shape.style) for index in range(shape.choices)}
        self._marks = silent_marks(shape.tokenizer)

    def first(self) -> Iterator[dict[str, Any]]:
        for index in range(self._shape.choices):
            yield self._chunk(index, {"role": "assistant", "content": ""})

    def chunks(self, event: Event) -> Iterator[dict[str, Any]]:
        if isinstance(event, Came):
            yield from self._came(event.part, event.token)
        elif isinstance(event, Ended):
            self.usage.add(event.report)
            deltas = self._deltas[event.part]
            for delta in deltas.push("", last=True):
                yield self._chunk(event.part, delta)
            finish = finish_of(event.report)
            yield self._chunk(event.part, {}, finish="tool_calls" if deltas.calls and finish == "stop" else finish)

    def _came(self, index: int, token: Token) -> Iterator[dict[str, Any]]:
        """Log-probabilities go with the first delta of a token, or with an empty one."""
        noted = [chat_logprob(self._shape.tokenizer, token)] if token.logprobs is not None else None
        for delta in self._deltas[index].push(token.text + self._marks.get(token.id, "")):
            yield self._chunk(index, delta, noted)
            noted = None
        if noted:
            yield self._chunk(index, {"content": ""}, noted)

    def last(self) -> dict[str, Any]:
        return self._object("chat.completion.chunk", []) | {"usage": self.usage.to_json()}

    def collect(self, chunk: dict[str, Any]) -> None:
        for choice in chunk["choices"]:
            found, delta = self._whole[choice["index"]], choice["delta"]
            found.content.append(delta.get("content", ""))
            found.reasoning.append(delta.get("reasoning_content", ""))
            found.calls += [{k: v for k, v in call.items() if k != "index"} for call in delta.get("tool_calls", [])]
            found.finish = choice["finish_reason"]
            if choice["logprobs"]:
                found.logprobs += choice["logprobs"]["content"]

    def whole(self) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": _message(found),
                "logprobs": {"content": found.logprobs, "refusal": None} if self._shape.logprobs else None,
                "finish_reason": found.finish,
            }
            for index, found in self._whole.items()
        ]
        return self._object("chat.completion", choices) | {"usage": self.usage.to_json()}

    def _chunk(
        self, index: int, delta: dict[str, Any], noted: list[Any] | None = None, finish: str | None = None
    ) -> dict[str, Any]:
        logprobs = None if noted is None else {"content": noted, "refusal": None}
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self._object("chat.completion.chunk", [choice])

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": kind, "choices": choices}


def _message(found: Whole) -> dict[str, Any]:
    """The message that one answer is."""
    content, reasoning = "".join(found.content), "".join(found.reasoning)
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if reasoning:
        message["reasoning_content"] = reasoning
    if found.calls:
        message |= {"content": content or None, "tool_calls": found.calls}
    return message
