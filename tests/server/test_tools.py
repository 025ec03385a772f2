"""Tools are shown by the model's own template, and its calls are read; so is what it thinks."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from flashrt.engine.generation import Token
from flashrt.server.answers import Usage
from flashrt.server.chat import ChatAnswers, Shape
from flashrt.server.deltas import HERMES, Style
from flashrt.server.job import Came, Ended
from tests.server.conftest import Server, Start, user
from tests.text.test_conversation import byte_level

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|user|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}{{ eos_token }}"
    "{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}{% if messages[0].content == 'on' %}<think>{% endif %}"
    "{# answers are split at </think> #}"
)
CALLING = TEMPLATE.replace("think>", "muse>")  # of a model that does not think
LOOK = {"type": "function", "function": {"name": "look", "description": "at", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def speaking(start: Start, packs: Any) -> Server:
    """A server of a model whose template knows tools, and opens a thought after 'on'."""
    return start(packs(template=TEMPLATE))


def ask(server: Server, text: str = "in", **fields: Any) -> Any:
    fields = {"max_tokens": 5} | fields
    return server.client().chat.completions.create(model=server.name, messages=user(text), **fields)


def test_tools_are_shown(speaking: Server) -> None:
    counts = [
        ask(speaking, **fields).usage.prompt_tokens
        for fields in ({}, {"tools": [LOOK]}, {"tools": [LOOK], "tool_choice": "none"}, {"tools": [LOOK, LOOK]})
    ]
    assert counts[0] == counts[2] < counts[1] < counts[3]


def test_a_call_that_comes_back_is_shown(speaking: Server) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"at": "ring"}'}}
    messages = [*user("in"), {"role": "assistant", "content": None, "tool_calls": [call]}]
    messages.append({"role": "tool", "tool_call_id": "call_1", "content": "on"})
    ids = speaking.post("/tokenize", json={"messages": messages}).json()["tokens"]
    text = "".join(byte_level().token_bytes(token).decode() for token in ids)
    assert '<tool_call>{"name": "look", "arguments": {"at": "ring"}}</tool_call>' in text


def test_a_thought_that_the_prompt_opens_is_reasoning(speaking: Server) -> None:
    message = ask(speaking, "on").choices[0].message
    assert message.content == ""
    assert message.reasoning_content
    streamed = list(ask(speaking, "on", stream=True))
    pieces = [getattr(chunk.choices[0].delta, "reasoning_content", None) or "" for chunk in streamed]
    assert "".join(pieces) == message.reasoning_content


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tool_choice": "always", "tools": [LOOK]}, "expected none, auto, required"),
        ({"tool_choice": {"type": "function", "function": {"name": "hear"}}, "tools": [LOOK]}, "none of the tools"),
        ({"tool_choice": {"type": "custom"}, "tools": [LOOK]}, "tool_choice is not supported"),
        ({"tool_choice": "auto"}, "there are no tools"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "no name"}}]}, "letters, digits"),
        (
            {
                "tools": [
                    {"type": "function", "function": {"name": "x", "strict": True, "parameters": {"type": "array"}}}
                ]
            },
            "are no object",
        ),
        ({"tools": [LOOK], "response_format": {"type": "json_object"}}, "leaves no room for calls"),
    ],
)
def test_what_is_not_supported_is_named(speaking: Server, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        ask(speaking, **fields)


def test_a_template_without_tools_refuses_them(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="tools is not supported"):
        ask(server, tools=[LOOK])


def test_calls_are_read() -> None:
    """Of tokens as they come, in a stream and as one object."""
    tokenizer = byte_level()
    shape = Shape("m", tokenizer, 1, False, Style(HERMES, reasons=True))
    text = '<think>so</think>I look.<tool_call>{"name": "look", "arguments": {"at": "ring"}}</tool_call>'
    answers = ChatAnswers(shape, Usage(3))
    chunks = [chunk for token in tokens_of(text) for chunk in answers.chunks(Came(0, token))]
    chunks += answers.chunks(Ended(0, ended()))
    for chunk in chunks:
        answers.collect(chunk)
    choice = answers.whole()["choices"][0]
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert (message["content"], message["reasoning_content"]) == ("I look.", "so")
    [call] = message["tool_calls"]
    assert call["function"]["name"] == "look"
    assert json.loads(call["function"]["arguments"]) == {"at": "ring"}
    assert call["id"].startswith("call_")


def tokens_of(text: str) -> list[Token]:
    """A text as it comes."""
    tokenizer = byte_level()
    stream = tokenizer.stream()
    return [Token(token, stream.push(token)) for token in tokenizer.encode(text, special=False)]


def ended() -> Any:
    """What is read of a report."""

    class Report:
        new_tokens, resumed_tokens, finish_reason = 9, 0, "eos"

    return Report()


def test_tools_that_are_nested_too_deeply_are_refused(speaking: Server) -> None:
    deep: dict[str, Any] = {}
    for _ in range(700):
        deep = {"properties": deep}
    tools = [{"type": "function", "function": {"name": "look", "parameters": deep}}]
    reply = speaking.post("/v1/chat/completions", json={"model": speaking.name, "messages": user("in"), "tools": tools})
    assert reply.status_code == 400
    assert "nested too deeply" in reply.json()["error"]["message"]


def test_variables_of_the_template(start: Start, packs: Any) -> None:
    server = start(packs(template=TEMPLATE + "{% if enable_thinking %}aaaa{% endif %}{{ reasoning_effort }}"))

    def prompt_of(**fields: Any) -> int:
        body = {"model": server.name, "messages": user("in"), "max_tokens": 1, **fields}
        reply = server.post("/v1/chat/completions", json=body)
        assert reply.status_code == 200, reply.text
        return int(reply.json()["usage"]["prompt_tokens"])

    plain = prompt_of()
    assert prompt_of(reasoning_effort="high") > plain
    assert prompt_of(chat_template_kwargs={"enable_thinking": True}) > plain
    assert prompt_of(chat_template_kwargs={"enable_thinking": False}) == plain
    for name in ("temper", "messages", "a b"):
        body = {"model": server.name, "messages": user("in"), "chat_template_kwargs": {name: 1}}
        reply = server.post("/v1/chat/completions", json=body)
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == name
