"""What an answer's text is, as it comes: content, reasoning between think tags, and calls of tools.

A model writes all of these as text, in the form that its template taught it. What does not have the form stays content:
nothing that a model wrote is lost.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from flashrt.engine.stops import overlap
from flashrt.text.tokenizer import Tokenizer

THINK, THOUGHT = "<think>", "</think>"
HERMES, HERMES_END = "<tool_call>", "</tool_call>"
MISTRAL, MISTRAL_ARGUMENTS = "[TOOL_CALLS]", "[ARGS]"
LLAMA = "<|python_tag|>"
MARKERS = (THINK, THOUGHT, HERMES, HERMES_END, MISTRAL, MISTRAL_ARGUMENTS, LLAMA)

Delta = dict[str, Any]
Call = tuple[str, str]  # a name, and arguments as JSON


def silent_marks(tokenizer: Tokenizer) -> dict[int | None, str]:
    """Markers that are special tokens, by token: text that is decoded says nothing of these."""
    special = tokenizer.special_texts
    return {tokenizer.token_id(mark): mark for mark in MARKERS if mark in special}


@dataclass(frozen=True)
class Style:
    """How a model says what is not content. `calls`: the opening of its calls; None: it was shown no tools.

    reasons: whether it thinks between tags; thinking: whether the prompt has opened these already
    """

    calls: str | None = None
    reasons: bool = False
    thinking: bool = False


def style_of(template: str, prompt_end: str, tools: bool) -> Style:
    """Of a model with this template, after a prompt that ends so."""
    reasons = THOUGHT in template
    thinking = reasons and prompt_end.rstrip().endswith(THINK)
    return Style(calls_of(template) if tools else None, reasons, thinking)


def calls_of(template: str) -> str | None:
    """The opening of calls in the form that a template shows; None where it shows none that is known."""
    if HERMES in template:
        return HERMES
    if MISTRAL in template:
        return MISTRAL
    return LLAMA if LLAMA in template or '"parameters": ' in template else None


class Deltas:
    """Of one answer: text in, deltas of OpenAI's form out."""

    def __init__(self, style: Style) -> None:
        self._style = style
        self._held, self._space = "", ""  # not told yet: of the state, and what may stand between two parts
        plain = not style.reasons and style.calls != LLAMA
        self._state = self._think if style.thinking else self._content if plain else self._start
        self.calls = 0

    def push(self, text: str, last: bool = False) -> Iterator[Delta]:
        """What is certain now; `last`: no more text comes."""
        self._held += text
        while True:
            before = (self._state, self._held)
            yield from self._state(last)
            if (self._state, self._held) == before:
                return

    def _start(self, last: bool) -> Iterator[Delta]:
        """Whether it thinks first, or is nothing but calls."""
        head, style = self._held.lstrip(), self._style
        undecided = not head or (style.reasons and THINK.startswith(head))
        if style.reasons and head.startswith(THINK):
            self._held, self._state = head[len(THINK) :], self._think
        elif last or not undecided:
            self._state = self._rest if style.calls == LLAMA and head[:1] == "{" else self._content
        yield from ()

    def _content(self, last: bool) -> Iterator[Delta]:
        """Space around calls is no content."""
        calls = self._style.calls
        text, mark = self._until(calls, last)
        text = self._space + text
        spoken = text.rstrip() if calls else text
        self._space = "" if mark else text[len(spoken) :]
        if last and not self.calls:
            spoken, self._space = spoken + self._space, ""
        if spoken:
            yield {"content": spoken}
        if mark:
            self._state = self._hermes if calls == HERMES else self._rest

    def _think(self, last: bool) -> Iterator[Delta]:
        text, mark = self._until(THOUGHT, last)
        if text:
            yield {"reasoning_content": text}
        if mark:
            self._state = self._behind

    def _behind(self, last: bool) -> Iterator[Delta]:
        """Lines between thoughts and what follows are no content."""
        self._held = self._held.lstrip("\n")
        if self._held or last:
            self._state = self._rest if self._style.calls == LLAMA and self._held[:1] == "{" else self._content
        yield from ()

    def _hermes(self, last: bool) -> Iterator[Delta]:
        body, mark, rest = self._held.partition(HERMES_END)
        if not mark and not last:
            return
        self._held, self._state = rest, self._content
        calls = _parsed(body)
        yield from self._called(calls) if calls else iter([{"content": HERMES + body + mark}])

    def _rest(self, last: bool) -> Iterator[Delta]:
        """All that comes is one call, or several: known at the end only."""
        if not last:
            return
        text, self._held = self._held, ""
        if not text:
            return
        calls = _parsed(text.strip())
        yield from self._called(calls) if calls else iter([{"content": text}])

    def _until(self, mark: str | None, last: bool) -> tuple[str, bool]:
        """Text before `mark`, and whether that was there: it is taken out. What may yet become one is held back."""
        text, found, rest = self._held.partition(mark) if mark else (self._held, "", "")
        if mark and not found and not last:
            cut = len(text) - overlap(text, mark)
            text, rest = text[:cut], text[cut:]
        self._held = rest
        return text, bool(found)

    def _called(self, calls: list[Call]) -> Iterator[Delta]:
        for name, arguments in calls:
            call = {"index": self.calls, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function"}
            self.calls += 1
            yield {"tool_calls": [call | {"function": {"name": name, "arguments": arguments}}]}


def _parsed(text: str) -> list[Call]:
    """Calls in JSON, or in Mistral's later form (a name, [ARGS], JSON); none where it is neither."""
    if MISTRAL_ARGUMENTS in text:
        parts = [part.partition(MISTRAL_ARGUMENTS) for part in text.split(MISTRAL) if part.strip()]
        calls = [_call({"name": name.strip(), "arguments": _json(arguments)}) for name, _, arguments in parts]
    else:
        found = _json(text)
        calls = [_call(item) for item in (found if isinstance(found, list) else [found])]
    return [call for call in calls if call is not None] if calls and None not in calls else []


def _json(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return None


def _call(found: Any) -> Call | None:
    if not isinstance(found, Mapping) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", found.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _json(arguments)
    return (found["name"], json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, Mapping) else None
