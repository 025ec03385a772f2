"""The grammar of answers that call tools: which calls there may be, in the form that the model's template shows.

What a model may say beside its calls stays free. The text of a form is what the model learned, down to its spaces.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from flashrt.engine.grammar import Grammar, Grammars, json_rule
from flashrt.errors import UsageError
from flashrt.server.deltas import (
    HERMES,
    HERMES_END,
    LLAMA,
    MARKERS,
    MISTRAL,
    MISTRAL_ARGUMENTS,
    THINK,
    THOUGHT,
    Style,
)
from flashrt.server.errors import invalid, refused
from flashrt.server.tools import Function, Use
from flashrt.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Form:
    """How calls stand in a text.

    mark: begins them; opening: follows it; between: of two; after: of each; closing: of all
    arguments: what they are called in a call of JSON; None: a call is a name, [ARGS] and arguments
    """

    mark: str
    opening: str = ""
    between: str | None = None  # there is no second
    after: str = ""
    closing: str = ""
    arguments: str | None = "arguments"


_HERMES = Form(HERMES, "\n", f"\n{HERMES}\n", f"\n{HERMES_END}")
_LLAMA = Form("", arguments="parameters")
_MISTRAL = Form(MISTRAL, " [", ", ", closing="]")
_MISTRAL_NAMED = Form(MISTRAL, between=MISTRAL, arguments=None)


def _form_of(template: str, style: Style) -> Form:
    if style.calls == MISTRAL:
        return _MISTRAL_NAMED if MISTRAL_ARGUMENTS in template else _MISTRAL
    return {HERMES: _HERMES, LLAMA: _LLAMA}[style.calls or ""]


def grammar_of_calls(
    grammars: Grammars | None, tokenizer: Tokenizer, template: str, style: Style, use: Use
) -> Grammar | None:
    """None where any text will do. Raises ApiError."""
    if not use.bound:
        return None
    if grammars is None:
        raise refused("tool_choice", "the model has no token that ends a text, so calls cannot be made sure of")
    writer = _Writer(tokenizer)
    try:
        return grammars.lark(writer.rules(_form_of(template, style), style, use))
    except (UsageError, RecursionError) as error:
        raise invalid("tools", f"tools: {error}") from None


_NO_OBJECT = r"/(\s*[^{\s](?s:.*))?/"


def _without(mark: str) -> str:
    return rf"/(?s:.*)/ & ~/(?s:.*{_escaped(mark)}.*)/"


def _escaped(text: str) -> str:
    return "".join(char if char.isalnum() or char in "_<>" else rf"\{char}" for char in text)


class _Writer:
    """Writes grammars in Lark's form, in which special tokens are no text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        special = tokenizer.special_texts
        self._special = {mark: tokenizer.token_id(mark) for mark in MARKERS if mark in special}

    def rules(self, form: Form, style: Style, use: Use) -> str:
        more = f"({self._text(form.between)} call)*" if use.several and form.between is not None else ""
        begin = self._text(form.mark) if use.required or not form.mark else "lead"
        answer = f"{begin} {self._text(form.opening)} call {more} {self._text(form.closing)}"
        if not use.required:
            answer += " | FREE"
        rules = f"start: {self._thought(style)} answer\nanswer: {answer}\n"
        rules += f"call: {' | '.join(f'call{i}' for i in range(len(use.functions)))}\n"
        rules += f"FREE: {_without(form.mark) if form.mark else _NO_OBJECT}\n"
        rules += self._until("lead", form.mark) + self._until("thought", THOUGHT)
        return rules + "".join(self._call(form, i, function) for i, function in enumerate(use.functions))

    def _until(self, name: str, mark: str) -> str:
        """A rule: any text, and the first `mark` behind it."""
        if mark in self._special:
            return f"{name}: /(?s:.*)/ {self._text(mark)}\n"
        return f"{name}[lazy]: /(?s:.*){_escaped(mark)}/\n"

    def _thought(self, style: Style) -> str:
        """What a model thinks before it answers."""
        if not style.reasons:
            return ""
        thought = r"thought /\n*/"
        return thought if style.thinking else f"({self._text(THINK)} {thought})?"

    def _call(self, form: Form, index: int, function: Function) -> str:
        schema = (function.parameters or {}) if function.strict else {}
        if schema.get("type", "object") != "object":
            raise UsageError(f"the parameters of {function.name} are no object")
        if form.arguments is None:
            opening, closing = f"{function.name}{MISTRAL_ARGUMENTS}", form.after
        else:
            opening = f'{{"name": {json.dumps(function.name)}, "{form.arguments}": '
            closing = f"}}{form.after}"
        rule = f"call{index}: {self._text(opening)} arguments{index} {self._text(closing)}\n"
        return rule + json_rule(f"arguments{index}", {**schema, "type": "object"})

    def _text(self, text: str) -> str:
        """A text, in which marks that are special tokens stand as these."""
        for mark, token in self._special.items():
            before, found, after = text.partition(mark)
            if found:
                return f"{self._text(before)} <[{token}]> {self._text(after)}"
        return json.dumps(text) if text else ""
