"""What is not supported is refused by name; what is malformed says where."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from flashrt.server import chat, completions
from flashrt.server.fields import HARMLESS
from tests.server.conftest import Server, user

DOCS = Path(__file__).parents[2] / "docs" / "server.md"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
VALUES: dict[str, Any] = {"audio": {"voice": "x"}, "modalities": ["audio"], "store": True, "best_of": 2}


def request(server: Server, path: str, **fields: Any) -> dict[str, Any]:
    body: dict[str, Any] = {"model": server.name, "max_tokens": 2}
    return body | ({"messages": user("on")} if path == CHAT else {"prompt": "on"}) | fields


def refusal(server: Server, path: str, **fields: Any) -> tuple[int, dict[str, Any]]:
    reply = server.post(path, json=request(server, path, **fields))
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return reply.status_code, error


@pytest.mark.parametrize(
    ("path", "name"),
    [*((CHAT, name) for name in chat.REFUSED), *((COMPLETIONS, name) for name in completions.REFUSED)],
)
def test_what_is_not_supported_is_named(server: Server, path: str, name: str) -> None:
    status, error = refusal(server, path, **{name: VALUES.get(name, "something")})
    assert (status, error["param"], error["code"]) == (400, name, "unsupported_parameter")
    assert error["message"].startswith(f"{name} is not supported: ")
    refusals = chat.REFUSED if path == CHAT else completions.REFUSED
    for neutral in (None, *refusals[name][1]):
        assert server.post(path, json=request(server, path, **{name: neutral})).status_code == 200


def test_what_says_who_asks_changes_nothing(server: Server) -> None:
    for path in (CHAT, COMPLETIONS):
        fields = dict.fromkeys(HARMLESS, "somebody")
        assert server.post(path, json=request(server, path, **fields)).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 101}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"seed": -2}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": 5}, "stop"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"131": 1}}, "logit_bias"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"other": 1}}, "stream_options"),
        ({"model": 5}, "model"),
        ({"unheard_of": 1}, "unheard_of"),
    ],
    ids=str,
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_what_is_malformed_says_where(server: Server, path: str, fields: dict[str, Any], param: str) -> None:
    status, error = refusal(server, path, **fields)
    assert (status, error["param"]) == (400, param), error
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "expected 1 to"),
        ([{"role": "pirate", "content": "on"}], "messages\\[0\\].role is 'pirate'"),
        ([{"role": "user"}], "messages\\[0\\].content is missing"),
        ([{"content": "on"}], "role"),
        ([{"role": "user", "content": 5}], "content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "not 'image_url'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "expected a type and a text"),
        ([{"role": "user", "content": "on", "name": "ann"}], "name is not supported"),
        ([{"role": "user", "content": "on", "unheard": 1}], "unheard"),
        ([{"role": "user", "content": "on", "tool_call_id": "x"}], "only a tool's message"),
        ([{"role": "assistant", "content": "on", "refusal": "no"}], "refusal is not supported"),
        ("on", "messages"),
        (None, "messages"),
    ],
    ids=str,
)
def test_messages_that_make_no_sense(server: Server, messages: Any, words: str) -> None:
    status, error = refusal(server, CHAT, messages=messages)
    assert status == 400
    assert re.search(words, error["message"]), error


def test_what_does_not_fit_is_refused_before_it_waits(server: Server) -> None:
    for fields in ({"messages": user("on " * 300)}, {"max_tokens": 500}, {"messages": user("on " * 300_000)}):
        status, error = refusal(server, CHAT, **fields)
        assert (status, error["code"]) == (400, "context_length_exceeded")


def test_top_logprobs_need_logprobs(server: Server) -> None:
    for fields in ({"top_logprobs": 2}, {"logprobs": True, "top_logprobs": 21}):
        assert refusal(server, CHAT, **fields)[1]["param"] == "top_logprobs"
    assert refusal(server, COMPLETIONS, logprobs=21)[1]["param"] == "logprobs"


def test_the_documentation_lists_each_parameter() -> None:
    """As supported, refused or harmless; and no other."""
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*) \| ([^|]*) \|", DOCS.read_text(), re.MULTILINE)
    documented = {name: (in_chat.strip(), in_completions.strip()) for name, in_chat, in_completions in rows}

    def said(name: str, fields: tuple[str, ...], refusals: dict[str, Any]) -> str:
        if name in HARMLESS:
            return "no effect"
        return "yes" if name in fields else "refused" if name in refusals else "unknown"

    kinds = (
        (chat.ChatFields.__struct_fields__, chat.REFUSED),
        (completions.CompletionFields.__struct_fields__, completions.REFUSED),
    )
    names = {*HARMLESS, *(name for fields, refusals in kinds for name in (*fields, *refusals))}
    expected = {name: tuple(said(name, fields, dict(refusals)) for fields, refusals in kinds) for name in names}
    assert documented == expected
