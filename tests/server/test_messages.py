"""Messages by Anthropic's own client: the same answers as in OpenAI's form."""

from __future__ import annotations

from typing import Any

import anthropic
import pytest

from flashrt.server.answers import Usage
from flashrt.server.anthropic import REFUSED
from flashrt.server.anthropic_answers import MessageAnswers, MessageShape
from flashrt.server.deltas import HERMES, Style
from flashrt.server.job import Came, Ended
from tests.server.conftest import KEY, Server, Start, user
from tests.server.test_tools import CALLING, TEMPLATE, ended, tokens_of
from tests.text.test_conversation import byte_level

LOOK = {"name": "look", "description": "at", "input_schema": {"type": "object"}}


def client(server: Server) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.base, api_key=KEY, max_retries=0, timeout=60)


def ask(server: Server, text: Any = "the thing on and on", **fields: Any) -> Any:
    fields = {"max_tokens": 12} | fields
    messages = [{"role": "user", "content": text}] if "messages" not in fields else fields.pop("messages")
    return client(server).messages.create(model=server.name, messages=messages, **fields)


def of_openai(server: Server, **fields: Any) -> str:
    create = server.client().chat.completions.create
    return (
        create(model=server.name, messages=user("the thing on and on"), max_tokens=12, **fields)
        .choices[0]
        .message.content
    )


@pytest.fixture(scope="module")
def speaking(start: Start, packs: Any) -> Server:
    return start(packs(template=TEMPLATE, max_position_embeddings=2048))


@pytest.fixture(scope="module")
def calling(start: Start, packs: Any) -> Server:
    return start(packs(template=CALLING, max_position_embeddings=2048))


def test_the_text_is_that_of_a_chat(server: Server) -> None:
    answer = ask(server)
    assert [block.type for block in answer.content] == ["text"]
    assert answer.content[0].text == of_openai(server)
    assert answer.stop_reason in ("max_tokens", "end_turn")
    assert answer.usage.output_tokens <= 12
    count = client(server).messages.count_tokens(model=server.name, messages=user("the thing on and on"))
    assert count.input_tokens == answer.usage.input_tokens + answer.usage.cache_read_input_tokens
    fields = {"temperature": 1.5, "top_p": 0.9, "top_k": 20}
    assert ask(server, extra_body=fields).content != answer.content


def test_a_stream_is_the_same_message(server: Server) -> None:
    with client(server).messages.stream(
        model=server.name, messages=user("the thing on and on"), max_tokens=12
    ) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text == of_openai(server)
    assert final.usage.output_tokens == ask(server).usage.output_tokens


def test_stop_sequences(server: Server) -> None:
    whole = of_openai(server)
    answer = ask(server, stop_sequences=[whole[3:5]])
    assert answer.content[0].text == whole[: whole.index(whole[3:5])]
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", whole[3:5])


def test_system_blocks_and_tools_are_shown(speaking: Server) -> None:
    counts = [
        client(speaking).messages.count_tokens(model=speaking.name, messages=user("in"), **fields).input_tokens
        for fields in ({}, {"system": "ring"}, {"tools": [LOOK]}, {"system": [{"type": "text", "text": "ring"}]})
    ]
    assert counts[0] < counts[1] == counts[3]
    assert counts[0] < counts[2]
    parts = [{"type": "text", "text": "the", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "ring"}]
    assert ask(speaking, parts).content == ask(speaking, "the\nring").content
    messages = [
        *user("in"),
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "look", "input": {"at": "ring"}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "a ring"}]},
    ]
    assert ask(speaking, messages=messages, tools=[LOOK]).content


def test_a_tool_that_has_to_be_called(calling: Server) -> None:
    for choice in ({"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "look"}):
        schema = {"type": "object", "properties": {"at": {"enum": ["ring"]}}, "required": ["at"]}
        tool = {"name": "look", "strict": True, "input_schema": {**schema, "additionalProperties": False}}
        answer = ask(calling, "in", tools=[tool], tool_choice=choice, max_tokens=150)
        assert answer.stop_reason == "tool_use"
        [block] = answer.content
        assert (block.type, block.name, block.input) == ("tool_use", "look", {"at": "ring"})


def test_a_thought_that_the_prompt_opens_is_thinking(speaking: Server) -> None:
    assert [block.type for block in ask(speaking, "on").content] == ["thinking"]


def test_blocks_are_built_of_what_comes() -> None:
    text = '<think>so</think>I look.<tool_call>{"name": "look", "arguments": {"at": "ring"}}</tool_call>'
    answers = MessageAnswers(MessageShape("m", byte_level(), Style(HERMES, reasons=True), ()), Usage(3))
    events = [*answers.first()]
    for token in tokens_of(text):
        events += answers.chunks(Came(0, token))
    events += answers.chunks(Ended(0, ended()))
    for event in events:
        answers.collect(event)
    message = answers.whole()
    assert [block["type"] for block in message["content"]] == ["thinking", "text", "tool_use"]
    assert message["content"][0]["thinking"] == "so"
    assert message["content"][1]["text"] == "I look."
    assert message["content"][2] | {"id": ""} == {"type": "tool_use", "id": "", "name": "look", "input": {"at": "ring"}}
    assert message["stop_reason"] == "tool_use"
    kinds = [event["type"] for event in events]
    assert kinds[0] == "message_start"
    assert kinds[-2:] == ["message_delta", "message_stop"]
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 3


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_named(server: Server, name: str) -> None:
    body = {"model": server.name, "max_tokens": 2, "messages": user("on")}
    reply = server.post("/v1/messages", json=body | {name: "something"})
    assert reply.status_code == 400
    assert reply.json()["type"] == "error"
    assert reply.json()["error"]["param"] == name
    for neutral in REFUSED[name][1]:
        assert server.post("/v1/messages", json=body | {name: neutral}).status_code == 200


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"messages": [{"role": "system", "content": "x"}]}, "expected user or assistant"),
        ({"messages": []}, "expected 1 or more"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "holds no 'image'"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]}, "holds no 'tool_use'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "text is missing"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": 5}]}]},
            "a text",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": ["x"]}]}
                ]
            },
            "blocks",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "tone": "dry"}]}]},
            "tone is not supported",
        ),
        ({"unheard_of": 1}, "unknown parameter"),
        ({"tools": [{"type": "web_search_20250305", "name": "x", "input_schema": {}}]}, "not supported"),
        ({"tool_choice": {"type": "any"}}, "there are no tools"),
        ({"tool_choice": {"type": []}}, "expected auto, none, any or tool"),
        ({"tool_choice": {"type": "all"}}, "expected auto, none, any or tool"),
        ({"temperature": 200}, "temperature is 200"),
    ],
)
def test_what_makes_no_sense_is_refused(server: Server, fields: dict[str, Any], words: str) -> None:
    body = {"model": server.name, "max_tokens": 2, "messages": user("on")} | fields
    reply = server.post("/v1/messages", json=body)
    assert reply.status_code == 400
    assert words in reply.json()["error"]["message"]


def test_what_agents_send_beside_is_taken(speaking: Server) -> None:
    """As Claude Code does: more tokens than there is room for, hints on thinking, and results that are errors."""
    plain = ask(speaking, "in")
    hints = {
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "output_config": {"effort": "medium"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "metadata": {"user_id": "u"},
    }
    assert ask(speaking, "in", extra_body=hints).content == plain.content
    long = ask(speaking, "in", max_tokens=32000)
    assert long.usage.output_tokens > plain.usage.output_tokens
    result = {"type": "tool_result", "tool_use_id": "t1", "content": "no such thing"}
    called = [{"type": "tool_use", "id": "t1", "name": "look", "input": {}}]
    counts = []
    for failed in (False, True):
        turns = [*user("in"), {"role": "assistant", "content": called}]
        turns.append({"role": "user", "content": [result | {"is_error": failed}]})
        counts.append(client(speaking).messages.count_tokens(model=speaking.name, messages=turns).input_tokens)
    assert counts[0] < counts[1]
