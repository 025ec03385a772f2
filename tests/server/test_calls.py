"""Calls that an answer has to hold, may hold, or holds once: by a grammar over the form of the model."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import numpy as np
import pytest

from flashrt.engine.grammar import Grammars
from flashrt.server.calls import grammar_of_calls
from flashrt.server.deltas import HERMES, LLAMA, MISTRAL, Style
from flashrt.server.tools import Function, Use
from tests.server.conftest import Server, Start, user
from tests.server.test_tools import CALLING
from tests.text.test_conversation import byte_level

SCHEMA = {
    "type": "object",
    "properties": {"at": {"enum": ["ring", "thing"]}},
    "required": ["at"],
    "additionalProperties": False,
}
FUNCTIONS = [Function("look", None, SCHEMA, True), Function("do")]
LOOK = '{"name": "look", "arguments": {"at": "ring"}}'
CALL = f"<tool_call>\n{LOOK}\n</tool_call>"
NAMED = '[TOOL_CALLS]look[ARGS]{"at": "ring"}'

# A text, its form, and whether it may come where a call is required, where one is not, and where there is one at most.
TEXTS: list[tuple[str, str, tuple[bool, bool, bool]]] = [
    ("hello", HERMES, (False, True, True)),
    (CALL, HERMES, (True, True, True)),
    (f"hm {CALL}", HERMES, (False, True, True)),
    (f"{CALL}\n{CALL}", HERMES, (True, True, False)),
    (CALL.replace("ring", "moon"), HERMES, (False, False, False)),
    (CALL.replace("look", "do").replace("ring", "moon"), HERMES, (True, True, True)),
    (CALL.replace("look", "leap"), HERMES, (False, False, False)),
    ("hi { there", LLAMA, (False, True, True)),
    (LOOK.replace("arguments", "parameters"), LLAMA, (True, True, True)),
    ("{}", LLAMA, (False, False, False)),
    ("hi", MISTRAL, (False, True, True)),
    (f"[TOOL_CALLS] [{LOOK}]", MISTRAL, (True, True, True)),
    (f"[TOOL_CALLS] [{LOOK}, {LOOK}]", MISTRAL, (True, True, False)),
    (NAMED, "[ARGS]", (True, True, True)),
    (NAMED + NAMED, "[ARGS]", (True, True, False)),
]


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(byte_level(), 131, [1])


def follows(grammars: Grammars, text: str, style: Style, use: Use, template: str = "") -> bool:
    grammar = grammar_of_calls(grammars, byte_level(), template, style, use)
    assert grammar is not None
    for token in [*byte_level().encode(text, special=False), 1]:
        logits = np.zeros(131, np.float32)
        grammar.mask(logits)
        if logits[token] < 0:
            return False
        grammar.accept(token)
    return True


@pytest.mark.parametrize(("text", "form", "expected"), TEXTS)
def test_which_texts_follow(grammars: Grammars, text: str, form: str, expected: tuple[bool, ...]) -> None:
    style = Style(MISTRAL if form == "[ARGS]" else form)
    uses = (Use(FUNCTIONS, True, True), Use(FUNCTIONS, False, True), Use(FUNCTIONS, False, False))
    assert tuple(follows(grammars, text, style, use, form) for use in uses) == expected


def test_thoughts_come_first(grammars: Grammars) -> None:
    use = Use(FUNCTIONS, True, False)
    assert follows(grammars, f"<think>so</think>\n\n{CALL}", Style(HERMES, reasons=True), use)
    assert follows(grammars, CALL, Style(HERMES, reasons=True), use)
    assert follows(grammars, f"so <b></think>\n\n{CALL}", Style(HERMES, reasons=True, thinking=True), use)
    assert not follows(grammars, f"so {CALL}", Style(HERMES, reasons=True, thinking=True), use)


def test_what_is_free_takes_no_grammar(grammars: Grammars) -> None:
    assert grammar_of_calls(grammars, byte_level(), "", Style(HERMES), Use([Function("do")], False, True)) is None


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "strict": True, "parameters": SCHEMA}}


def called(server: Server, **fields: Any) -> Any:
    create = server.client().chat.completions.create
    fields = {"tools": [tool("look"), tool("hear")], "max_tokens": 180, "messages": user("in")} | fields
    return create(model=server.name, **fields).choices[0]


@pytest.mark.parametrize("speculate", ["off", "8"])
def test_a_random_model_calls(start: Start, packs: Any, speculate: str) -> None:
    """One that never learned to: so it is the grammar that does it; with drafts too."""
    server = start(packs(template=CALLING, max_position_embeddings=2048), "--speculate", speculate)
    named = {"type": "function", "function": {"name": "hear"}}
    for seed in range(4):
        fields = {"temperature": 1.0, "seed": seed}
        choice = called(server, tool_choice=named, **fields)
        assert choice.finish_reason == "tool_calls"
        [call] = choice.message.tool_calls
        assert call.function.name == "hear"
        jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
        [call] = called(server, tool_choice="required", parallel_tool_calls=False, **fields).message.tool_calls
        jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
