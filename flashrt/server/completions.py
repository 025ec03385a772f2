"""/v1/completions: texts, or lists of tokens, that are gone on with as they are."""

from __future__ import annotations

import time
import uuid
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from flashrt.server.answers import CompletionLogprobs, Usage, characters, finish_of
from flashrt.server.desk import Asked, Desk
from flashrt.server.errors import invalid
from flashrt.server.fields import Fields, Refusals, convert
from flashrt.server.job import Came, Ended, Event, Failed, Part, Rules, Scored
from flashrt.text.tokenizer import Tokenizer

MOST_PROMPTS = 256
DEFAULT_TOKENS = 16  # as OpenAI has it
REFUSED: Refusals = {
    "suffix": ("the model's own tokens for filling in can be written in the prompt", ("",)),
    "best_of": ("ask for n", (1,)),
}


class CompletionFields(Fields, kw_only=True):
    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    ignore_eos: bool | None = None


def completion(desk: Desk, given: dict[str, Any]) -> Asked:
    """Raises ApiError."""
    fields = convert(given, CompletionFields, REFUSED)
    top = None if fields.logprobs is None else _checked_top(fields.logprobs)
    limit = DEFAULT_TOKENS if fields.max_tokens is None else fields.max_tokens
    sampling, parts, texts = desk.sampling(fields), [], []
    for text, prompt in _prompts(desk, fields.prompt):
        new = desk.prompts.limit(prompt, limit, "max_tokens")
        scored = top if fields.echo else None
        texts.append(text)
        for choice in desk.seeded(sampling, fields.choices):
            parts.append(Part(prompt, new, choice, scored))
    desk.check_size(parts, top)
    shape = Shape(desk.name, desk.prompts.tokenizer, texts, fields.choices, bool(fields.echo), top is not None)
    usage = Usage(sum(len(part.prompt) for part in parts[:: fields.choices]))
    answers = Completions(shape, parts, usage)
    rules = Rules(fields.stops, top, bool(fields.ignore_eos))
    return Asked(parts, rules, answers, bool(fields.stream), fields.include_usage)


def _checked_top(logprobs: int) -> int:
    if not 0 <= logprobs <= 20:
        raise invalid("logprobs", f"logprobs is {logprobs}, expected 0 to 20")
    return logprobs


def _prompts(desk: Desk, prompt: str | list[Any]) -> Iterator[tuple[str, array[int]]]:
    """The text of each prompt as `echo` gives it back, and its tokens."""
    prompts = desk.prompts
    many: list[Any] = [prompt] if isinstance(prompt, str) or all(isinstance(item, int) for item in prompt) else prompt
    if not many or not many[0]:
        raise invalid("prompt", "the prompt is empty: give at least one token")
    if len(many) > MOST_PROMPTS or any(type(each) is not type(many[0]) for each in many):
        raise invalid("prompt", f"prompt: expected at most {MOST_PROMPTS}, all texts or all lists of tokens")
    for each in many:
        if isinstance(each, str):
            yield each, prompts.text(each)
        else:
            ids = prompts.ids(each)
            yield prompts.tokenizer.decode(ids, skip_special=False), ids


@dataclass(frozen=True)
class Shape:
    """What answers are made of: `texts` of the prompts, each with `choices` answers."""

    name: str
    tokenizer: Tokenizer
    texts: list[str]
    choices: int
    echo: bool
    logprobs: bool


@dataclass
class Whole:
    """One answer, as its chunks come."""

    texts: list[str] = field(default_factory=list)
    logprobs: dict[str, list[Any]] = field(default_factory=dict)
    finish: str | None = None


class Completions:
    """Events as chunks, and all chunks of an answer as one object. See `Answers`."""

    named = False

    def __init__(self, shape: Shape, parts: list[Part], usage: Usage) -> None:
        self._shape, self._parts, self.usage = shape, parts, usage
        self._head = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": shape.name}
        self._logprobs: dict[int, CompletionLogprobs] = {}
        self._whole: dict[int, Whole] = {}
        self._echoed: set[int] = set()

    def chunks(self, event: Event) -> Iterator[dict[str, Any]]:
        """See `Answers.chunks`."""
        part = event.part if not isinstance(event, Failed) else 0
        text = self._echo(part)
        if isinstance(event, Scored):
            held = sum(characters(self._shape.tokenizer, token) for token in self._parts[part].prompt)
            self._lists(part, len(text) - held)  # the text may lack the token that begins it
            for token, noted in zip(self._parts[part].prompt, [None, *event.logprobs], strict=True):
                self._lists(part, 0).add(token, noted)
            yield self._chunk(part, text, None)
        elif isinstance(event, Came):
            if event.token.logprobs is not None:
                self._lists(part, len(text)).add(event.token.id, event.token.logprobs)
            yield self._chunk(part, text + event.token.text, None)
        elif isinstance(event, Ended):
            self.usage.add(event.report, self._parts[part].prompt_logprobs is not None)
            yield self._chunk(part, text, finish_of(event.report))

    def first(self) -> Iterator[dict[str, Any]]:
        """Chunks before any event."""
        return iter(())

    def last(self) -> dict[str, Any]:
        """The chunk that holds the usage."""
        return self._object([]) | {"usage": self.usage.to_json()}

    def collect(self, chunk: dict[str, Any]) -> None:
        """Keep a chunk for `whole`."""
        for choice in chunk["choices"]:
            found = self._whole.setdefault(choice["index"], Whole())
            found.texts.append(choice["text"])
            found.finish = choice["finish_reason"]
            for name, values in (choice["logprobs"] or {}).items():
                found.logprobs.setdefault(name, []).extend(values)

    def whole(self) -> dict[str, Any]:
        """The answer that the chunks are."""
        choices = [
            {"index": i, "text": "".join(each.texts), "logprobs": each.logprobs or None, "finish_reason": each.finish}
            for i, each in sorted(self._whole.items())
        ]
        return self._object(choices) | {"usage": self.usage.to_json()}

    def _echo(self, part: int) -> str:
        """The text of the prompt, the first time."""
        if not self._shape.echo or part in self._echoed:
            return ""
        self._echoed.add(part)
        return self._shape.texts[part // self._shape.choices]

    def _lists(self, part: int, offset: int) -> CompletionLogprobs:
        """`offset`: characters before the first token that is added."""
        return self._logprobs.setdefault(part, CompletionLogprobs(self._shape.tokenizer, offset))

    def _chunk(self, part: int, text: str, finish: str | None) -> dict[str, Any]:
        logprobs = None
        if self._shape.logprobs:
            lists = self._lists(part, 0)
            logprobs = lists.to_json()
            lists.clear()
        return self._object([{"index": part, "text": text, "logprobs": logprobs, "finish_reason": finish}])

    def _object(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": "text_completion", "choices": choices}
