"""/v1/responses by OpenAI's own client: the same answers as in chats."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import openai
import pytest

from flashrt.server.answers import Usage
from flashrt.server.chat import Shape
from flashrt.server.deltas import HERMES, Style
from flashrt.server.job import Came, Ended
from flashrt.server.response_answers import ResponseAnswers
from flashrt.server.responses import REFUSED
from tests.server.conftest import Server, Start, user
from tests.server.test_calls import SCHEMA
from tests.server.test_tools import CALLING, TEMPLATE, ended, tokens_of
from tests.text.test_conversation import byte_level

TEXT = "the thing on and on"
LOOK = {"type": "function", "name": "look", "description": "at", "parameters": SCHEMA, "strict": True}


@pytest.fixture(scope="module")
def speaking(start: Start, packs: Any) -> Server:
    return start(packs(template=TEMPLATE, max_position_embeddings=2048))


@pytest.fixture(scope="module")
def calling(start: Start, packs: Any) -> Server:
    return start(packs(template=CALLING, max_position_embeddings=2048))


def ask(server: Server, given: Any = TEXT, **fields: Any) -> Any:
    fields = {"max_output_tokens": 12} | fields
    return server.client().responses.create(model=server.name, input=given, **fields)


def test_the_text_is_that_of_a_chat(server: Server) -> None:
    chat = server.client().chat.completions.create
    for fields in ({}, {"temperature": 1.5, "top_p": 0.5}):
        extra = {"extra_body": {"seed": 3}} if fields else {}
        expected = chat(model=server.name, messages=user(TEXT), max_tokens=12, **fields, **extra)
        if not fields:  # this form has no seed
            answer = ask(server)
            assert answer.output_text == expected.choices[0].message.content
            assert answer.usage.input_tokens == expected.usage.prompt_tokens
            assert answer.usage.output_tokens == expected.usage.completion_tokens
        else:
            assert (ask(server, **fields).temperature, ask(server, **fields).top_p) == (1.5, 0.5)
    assert answer.status == ("incomplete" if expected.choices[0].finish_reason == "length" else "completed")


def test_a_stream_is_the_same_response(server: Server) -> None:
    with server.client().responses.stream(model=server.name, input=TEXT, max_output_tokens=12) as stream:
        events = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    whole = ask(server)
    assert text == events[-1].response.output_text == whole.output_text
    assert events[-1].type == f"response.{whole.status}"


def test_items_are_a_conversation(speaking: Server) -> None:
    """As agents send it: what was called, what came of it, and thoughts, go into one message each."""
    messages = [
        {"role": "system", "content": "ring"},
        *user("in"),
        {
            "role": "assistant",
            "content": "on",
            "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "look", "arguments": '{"at": "ring"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "c", "content": "a\nring"},
    ]
    expected = speaking.post("/tokenize", json={"messages": messages}).json()["tokens"]
    items = [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "in"}]},
        {"type": "reasoning", "id": "rs", "summary": [], "encrypted_content": "xyz"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "on", "annotations": []}]},
        {"type": "function_call", "id": "fc", "call_id": "c", "name": "look", "arguments": '{"at": "ring"}'},
        {
            "type": "function_call_output",
            "call_id": "c",
            "output": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "ring"}],
        },
    ]
    answer = ask(
        speaking,
        items,
        instructions="ring",
        store=False,
        include=["reasoning.encrypted_content"],
        tool_choice="auto",
        parallel_tool_calls=True,
        prompt_cache_key="k",
    )
    assert answer.usage.input_tokens == len(expected)


def test_tools_and_schemas(calling: Server, server: Server) -> None:
    for choice in ("required", {"type": "function", "name": "look"}):
        answer = ask(calling, "in", tools=[LOOK], tool_choice=choice, parallel_tool_calls=False, max_output_tokens=180)
        [call] = answer.output
        assert (answer.status, call.type, call.name) == ("completed", "function_call", "look")
        jsonschema.validate(json.loads(call.arguments), SCHEMA)
    form = {"format": {"type": "json_schema", "name": "it", "schema": SCHEMA, "strict": True}}
    jsonschema.validate(json.loads(ask(server, text=form, max_output_tokens=100).output_text), SCHEMA)


def test_items_are_built_of_what_comes() -> None:
    text = '<think>so</think>I look.<tool_call>{"name": "look", "arguments": {"at": "ring"}}</tool_call>'
    answers = ResponseAnswers(Shape("m", byte_level(), 1, False, Style(HERMES, reasons=True)), Usage(3), {})
    events = [*answers.first()]
    for token in tokens_of(text):
        events += answers.chunks(Came(0, token))
    events += answers.chunks(Ended(0, ended()))
    response = answers.whole()
    assert [item["type"] for item in response["output"]] == ["reasoning", "message", "function_call"]
    assert response["output"][0]["content"][0]["text"] == "so"
    assert response["output"][1]["content"][0]["text"] == "I look."
    assert json.loads(response["output"][2]["arguments"]) == {"at": "ring"}
    assert response["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    kinds = [event["type"] for event in events]
    assert kinds[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
    assert kinds[-1] == "response.completed"
    assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 3
    assert "response.function_call_arguments.done" in kinds


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_named(server: Server, name: str) -> None:
    body = {"model": server.name, "max_output_tokens": 2, "input": "on"}
    reply = server.post("/v1/responses", json=body | {name: True})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, name)
    for neutral in REFUSED[name][1]:
        assert server.post("/v1/responses", json=body | {name: neutral}).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": ["message"]}]}, "input[0].type"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": "on", "tone": 1}]}, "input[0].tone"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
        ({"input": [{"role": "pirate", "content": "on"}]}, "input[0].role"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 5000}, "input"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"unheard_of": 1}, "unheard_of"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(server: Server, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as found:
        ask(server, fields.pop("input", "on"), extra_body=fields)
    assert found.value.param == param
