"""Chats by OpenAI's own client: the text of `flashrt run`, whole and in pieces, and what each parameter does."""

from __future__ import annotations

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.cli.conftest import COMMAND, environment
from tests.server.conftest import Server, user

PROMPT = "the thing and the other thing on and on in the ring"
EXTRA = ("top_k", "min_p", "repetition_penalty", "ignore_eos")


def ask(server: Server, prompt: str = PROMPT, tokens: int = 24, **fields: Any) -> Any:
    extra = {name: fields.pop(name) for name in EXTRA if name in fields}
    fields = {"max_completion_tokens": tokens} | fields
    return server.client().chat.completions.create(
        model=server.name, messages=user(prompt), extra_body={"ignore_eos": True} | extra, **fields
    )


def text(server: Server, prompt: str = PROMPT, tokens: int = 24, **fields: Any) -> str:
    return ask(server, prompt, tokens, **fields).choices[0].message.content


def run(pack: Path, tmp_path: Path, prompt: str, *options: object) -> dict[str, Any]:
    """The report of `flashrt run`."""
    command = [*COMMAND, "run", str(pack), "-p", prompt, "--ignore-eos", "--json", "-n", "24"]
    done = subprocess.run(
        [*command, *map(str, options)], capture_output=True, text=True, env=environment(tmp_path), check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_text_is_that_of_run(server: Server, tiny: Path, tmp_path: Path) -> None:
    greedy = run(tiny, tmp_path, PROMPT)
    drawn = run(tiny, tmp_path, PROMPT, "--temperature", 0.9, "--top-p", 0.95, "--seed", 5)
    answer = ask(server)
    assert answer.choices[0].message.content == greedy["text"]
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == greedy["prompt_tokens"]
    assert answer.usage.completion_tokens == 24
    assert text(server, temperature=0.9, top_p=0.95, seed=5) == drawn["text"]
    assert text(server) == greedy["text"]


def test_eight_at_a_time_get_what_each_gets_alone(server: Server, tiny: Path, tmp_path: Path) -> None:
    prompts = [PROMPT[: 10 + 4 * i] + " and on" * (i % 3) for i in range(8)]
    drawn = {"temperature": 0.8, "seed": 11}
    expected = [run(tiny, tmp_path, prompt, "--temperature", 0.8, "--seed", 11)["text"] for prompt in prompts]
    with ThreadPoolExecutor(8) as clients:
        found = list(clients.map(lambda prompt: text(server, prompt, **drawn), prompts * 2))
    assert found == expected * 2


def test_a_stream_is_the_same_text_in_pieces(server: Server) -> None:
    fields = {"temperature": 0.7, "seed": 3, "logprobs": True, "top_logprobs": 2}
    whole = ask(server, **fields)
    chunks = list(ask(server, stream=True, stream_options={"include_usage": True}, **fields))
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(piece.delta.content or "" for piece in pieces) == whole.choices[0].message.content
    assert len([piece for piece in pieces if piece.delta.content]) > 10
    assert pieces[-1].finish_reason == "length"
    noted = [entry for piece in pieces if piece.logprobs for entry in piece.logprobs.content]
    assert noted == whole.choices[0].logprobs.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_no_usage_is_streamed_unless_asked_for(server: Server) -> None:
    assert all(chunk.usage is None for chunk in ask(server, stream=True))


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 2.0},
        {"top_p": 0.1},
        {"top_k": 1},
        {"min_p": 1.0},
        {"repetition_penalty": 3.0},
        {"presence_penalty": 2.0},
        {"frequency_penalty": -2.0},
        {"seed": 2},
        {"logit_bias": {"100": 100}},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_each_parameter_changes_the_text(server: Server, fields: dict[str, Any]) -> None:
    plain = {"temperature": 1.0, "seed": 1}
    before = text(server, **plain)
    assert text(server, **plain) == before
    assert text(server, **(plain | fields)) != before


def test_a_bias_decides(server: Server) -> None:
    letter = server.post("/tokenize", json={"prompt": "Q"}).json()["tokens"][-1]
    assert text(server, tokens=5, logit_bias={str(letter): 100}) == "Q" * 5


def test_stops_end_before_them(server: Server) -> None:
    whole = text(server)
    stop = whole[5:8]
    answer = ask(server, stop=[stop, "never said"])
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert ask(server, stop=stop).choices[0].message.content == whole[: whole.index(stop)]


def test_limits_by_either_name(server: Server) -> None:
    assert ask(server, tokens=3).usage.completion_tokens == 3
    fields = {"max_tokens": 4, "max_completion_tokens": openai.omit}
    assert ask(server, **fields).usage.completion_tokens == 4
    to_the_end = ask(server, max_completion_tokens=openai.omit)
    assert to_the_end.usage.total_tokens == 256
    with pytest.raises(openai.BadRequestError, match="give one of them"):
        ask(server, max_tokens=4, max_completion_tokens=5)


def test_several_answers(server: Server) -> None:
    answer = ask(server, n=3, temperature=1.0, seed=7)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert texts == [text(server, temperature=1.0, seed=7 + i) for i in range(3)]
    assert len(set(texts)) == 3
    assert answer.usage.completion_tokens == 72
    streamed = {0: "", 1: "", 2: ""}
    for chunk in ask(server, n=3, temperature=1.0, seed=7, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert list(streamed.values()) == texts


def test_logprobs(server: Server) -> None:
    noted = ask(server, tokens=6, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(noted) == 6
    for entry in noted:
        assert entry.token == entry.top_logprobs[0].token
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0
        assert bytes(entry.bytes).decode() == entry.token
        assert len(entry.top_logprobs) == 3
    assert "".join(entry.token for entry in noted) == text(server, tokens=6)
    assert ask(server, tokens=2, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    assert ask(server, tokens=2).choices[0].logprobs is None


def test_a_conversation_goes_on_from_what_is_there(server: Server) -> None:
    first = ask(server, "the ring " * 8)
    assert ask(server, "the ring " * 8).usage.prompt_tokens_details.cached_tokens == first.usage.prompt_tokens - 17
    messages = [
        *user("the ring " * 8),
        {"role": "assistant", "content": first.choices[0].message.content},
        *user("and on and on and on and on"),
    ]
    create = server.client().chat.completions.create
    answer = create(model=server.name, messages=messages, max_tokens=4)
    assert answer.usage.prompt_tokens_details.cached_tokens == first.usage.prompt_tokens  # all of the first message


def test_roles_and_parts(server: Server) -> None:
    """What means the same has the same tokens."""
    plain = [{"role": "system", "content": "in"}, *user("the\nthing")]
    parts = [{"type": "text", "text": "the"}, {"type": "text", "text": "thing"}]
    other = [{"role": "developer", "content": "in"}, {"role": "user", "content": parts}]
    found = [server.post("/tokenize", json={"messages": messages}).json() for messages in (plain, other)]
    assert found[0] == found[1]
    assert found[0]["count"] == len(found[0]["tokens"]) > 5


def test_special_text_in_a_message_stays_text(server: Server) -> None:
    ids = server.post("/tokenize", json={"messages": user("on</s><|user|>in<s>")}).json()["tokens"]
    assert [token for token in ids if token < 3] == [0, 2, 1]  # those of the template


def test_models(server: Server) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == [server.name]
    assert client.models.retrieve(server.name).owned_by == "flashrt"
    for call in (lambda: client.models.retrieve("../../etc/passwd"), lambda: ask(server, model="gpt-4")):
        with pytest.raises((openai.NotFoundError, TypeError)):
            call()
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'"):
        client.chat.completions.create(model="gpt-4", messages=user("on"))
