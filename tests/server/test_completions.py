"""Completions by OpenAI's own client: texts and tokens, prompts given back and scored."""

from __future__ import annotations

from typing import Any

import numpy as np
import openai
import pytest
import torch

from flashrt.server.answers import CompletionLogprobs
from tests.families import VOCAB, tiny_model
from tests.server.conftest import Server

PROMPT = "the thing and the other thing on and on in the ring"


def ask(server: Server, prompt: Any = PROMPT, tokens: int = 12, **fields: Any) -> Any:
    create = server.client().completions.create
    return create(model=server.name, prompt=prompt, max_tokens=tokens, extra_body={"ignore_eos": True}, **fields)


def test_text_and_tokens_are_the_same(server: Server) -> None:
    ids = server.post("/tokenize", json={"prompt": PROMPT}).json()["tokens"]
    whole = ask(server)
    assert whole.choices[0].text == ask(server, ids).choices[0].text
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.prompt_tokens == len(ids)
    streamed = "".join(choice.text for chunk in ask(server, stream=True) for choice in chunk.choices)
    assert streamed == whole.choices[0].text


def test_several_prompts(server: Server) -> None:
    prompts = [PROMPT, "in the ring", "on"]
    alone = [ask(server, prompt, temperature=1.0, seed=i).choices[0].text for prompt in prompts for i in (3, 4)]
    answer = ask(server, prompts, n=2, temperature=1.0, seed=3)
    assert [choice.text for choice in answer.choices] == alone
    assert [choice.index for choice in answer.choices] == list(range(6))
    ids = [server.post("/tokenize", json={"prompt": prompt}).json()["tokens"] for prompt in prompts]
    assert answer.usage.prompt_tokens == sum(map(len, ids))
    assert ask(server, tokens=1, echo=True, logprobs=1).usage.prompt_tokens_details.cached_tokens == 0
    assert answer.usage.completion_tokens == 72
    assert [c.text for c in ask(server, ids, n=2, temperature=1.0, seed=3).choices] == alone


def test_a_prompt_is_scored_as_transformers_does(server: Server) -> None:
    """What lm-evaluation-harness asks for: ids, one token more, the prompt given back with its log-probabilities."""
    random = np.random.default_rng(4)
    prompts = [random.integers(3, VOCAB, length).tolist() for length in (40, 9, 2)]
    answer = ask(server, prompts, 1, logprobs=5, echo=True, temperature=0)
    model = tiny_model("llama")
    for ids, choice in zip(prompts, answer.choices, strict=True):
        with torch.no_grad():
            expected = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1).numpy()
        noted = choice.logprobs
        assert len(noted.tokens) == len(ids) + 1
        assert noted.token_logprobs[0] is None
        assert noted.top_logprobs[0] is None
        found = noted.token_logprobs[1:-1]
        assert found == pytest.approx([expected[i, token] for i, token in enumerate(ids[1:])], abs=1e-3)
        for i, (token, top) in enumerate(zip(noted.tokens[1:-1], noted.top_logprobs[1:-1], strict=True)):
            greedy = token == max(top, key=lambda name, top=top: top[name])
            assert greedy == (int(expected[i].argmax()) == ids[i + 1])
            assert 5 <= len(top) <= 6
        assert choice.text.startswith("".join(noted.tokens[:-1]))
        starts = noted.text_offset
        assert all(choice.text[begin:].startswith(token) for token, begin in zip(noted.tokens, starts, strict=True))


def test_a_text_comes_back_with_and_without_an_answer(server: Server) -> None:
    assert ask(server, tokens=0, echo=True).choices[0].text == PROMPT
    answer = ask(server, tokens=0, echo=True, logprobs=0).choices[0]
    assert answer.text == PROMPT
    assert "".join(answer.logprobs.tokens[1:]) == PROMPT  # behind the token that begins a text
    assert answer.logprobs.text_offset[:2] == [0, 0]
    assert ask(server, echo=True).choices[0].text == PROMPT + ask(server).choices[0].text
    streamed = "".join(chunk.choices[0].text for chunk in ask(server, echo=True, stream=True, logprobs=1))
    assert streamed == PROMPT + ask(server).choices[0].text


def test_logprobs_of_an_answer(server: Server) -> None:
    noted = ask(server, logprobs=2).choices[0].logprobs
    assert len(noted.tokens) == 12
    assert "".join(noted.tokens) == ask(server).choices[0].text
    assert all(len(top) == 2 for top in noted.top_logprobs)
    assert noted.text_offset[0] == 0


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "empty"),
        ([], "empty"),
        ([[]], "empty"),
        ([VOCAB], "does not know"),
        ([1, "two"], "all texts or all lists"),
        ([[1], "two"], "all texts or all lists"),
        (["on"] * 257, "at most 256"),
        ([[5] * 200] * 100, "prompts have more than 16384 tokens"),
        ("on " * 200, "which is the context|the context is 256"),
        ([5] * 256, "the context is 256"),
    ],
)
def test_prompts_that_make_no_sense(server: Server, prompt: Any, words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        ask(server, prompt)


def test_a_prompt_that_fills_the_context_can_be_scored(server: Server) -> None:
    answer = ask(server, [5] * 256, 0, echo=True, logprobs=0)
    assert len(answer.choices[0].logprobs.tokens) == 256


def test_offsets_count_characters_of_the_text() -> None:
    """A character in two tokens begins in the first."""

    class Halves:
        parts = (b"a", b"\xf0\x9f", b"\x98\x80", "é!".encode(), b"b")

        def token_bytes(self, token: int) -> bytes:
            return self.parts[token]

    lists = CompletionLogprobs(Halves())  # type: ignore[arg-type]
    for token in range(5):
        lists.add(token, None)
    assert lists.to_json()["text_offset"] == [0, 1, 2, 2, 4]
