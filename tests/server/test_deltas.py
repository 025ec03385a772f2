"""Answers in parts: however the text is cut, the same content, reasoning and calls; and nothing lost."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from flashrt.server.deltas import HERMES, LLAMA, MISTRAL, Deltas, Style, calls_of, style_of

CALL = '{"name": "look", "arguments": {"at": "the\\nring", "n": 2}}'
ARGUMENTS = {"at": "the\nring", "n": 2}


def read(style: Style, text: str, seed: int) -> dict[str, Any]:
    """What comes of a text that is cut at random places."""
    generator, deltas, found = random.Random(seed), Deltas(style), {"content": "", "reasoning_content": "", "calls": []}
    pieces = []
    while text:
        size = generator.randrange(1, 9) if seed else len(text)
        pieces.append(text[:size])
        text = text[size:]
    for piece, last in [*((piece, False) for piece in pieces), ("", True)]:
        for delta in deltas.push(piece, last):
            for name in ("content", "reasoning_content"):
                found[name] += delta.get(name, "")
            for call in delta.get("tool_calls", []):
                assert call["index"] == len(found["calls"])
                found["calls"].append((call["function"]["name"], json.loads(call["function"]["arguments"])))
    return found


@pytest.mark.parametrize(
    ("style", "text", "content", "reasoning", "calls"),
    [
        (Style(), f"<think>a</think>{HERMES}{CALL}\n", f"<think>a</think>{HERMES}{CALL}\n", "", 0),
        (Style(reasons=True), "<think>\nwell\n</think>\n\nthe ring \n", "the ring \n", "\nwell\n", 0),
        (Style(reasons=True), "the <think>ring</think>", "the <think>ring</think>", "", 0),
        (Style(reasons=True), "  the  ring", "  the  ring", "", 0),
        (Style(reasons=True), "<think>never ends <", "", "never ends <", 0),
        (Style(reasons=True, thinking=True), "well</think>\nthe ring", "the ring", "well", 0),
        (Style(HERMES), f"{HERMES}\n{CALL}\n</tool_call>", "", "", 1),
        (Style(HERMES), f"I look.\n{HERMES}\n{CALL}\n</tool_call>\n{HERMES}{CALL}</tool_call>\n", "I look.", "", 2),
        (Style(HERMES, reasons=True), f"<think>so</think>\n\n{HERMES}{CALL}</tool_call>", "", "so", 1),
        (Style(HERMES), f"{HERMES}no call</tool_call> on", f"{HERMES}no call</tool_call> on", "", 0),
        (Style(HERMES), f"{HERMES}{CALL}", "", "", 1),
        (Style(HERMES), f"{HERMES}half", f"{HERMES}half", "", 0),
        (Style(HERMES), "a < b <tool_ca and on\n", "a < b <tool_ca and on\n", "", 0),
        (Style(MISTRAL), f"{MISTRAL}[{CALL}, {CALL}]", "", "", 2),
        (
            Style(MISTRAL),
            f"on {MISTRAL}look[ARGS]{json.dumps(ARGUMENTS)}{MISTRAL}look[ARGS]{json.dumps(ARGUMENTS)}",
            "on",
            "",
            2,
        ),
        (Style(MISTRAL), f"{MISTRAL}what?", "what?", "", 0),
        (Style(LLAMA), CALL.replace("arguments", "parameters"), "", "", 1),
        (Style(LLAMA), f"{LLAMA}{CALL}", "", "", 1),
        (Style(LLAMA), '{"a": 1} is JSON', '{"a": 1} is JSON', "", 0),
        (Style(LLAMA), "the ring {", "the ring {", "", 0),
    ],
)
@pytest.mark.parametrize("seed", range(6))
def test_parts(style: Style, text: str, content: str, reasoning: str, calls: int, seed: int) -> None:
    expected = {"content": content, "reasoning_content": reasoning, "calls": [("look", ARGUMENTS)] * calls}
    assert read(style, text, seed) == expected


def test_templates_say_how_models_speak() -> None:
    assert calls_of("... <tool_call>\n ...") == HERMES
    assert calls_of("{{ '[TOOL_CALLS]' }}") == MISTRAL
    assert calls_of("{{ '<|python_tag|>' }}") == LLAMA
    assert calls_of("{{ messages }}") is None
    assert style_of("{{ x.split('</think>') }}", "assistant\n<think>\n", tools=False) == Style(None, True, True)
    assert style_of("no tags", "<think>", tools=True) == Style()
