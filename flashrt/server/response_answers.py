"""Answers in the form of /v1/responses: items, and events that build them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from flashrt.server.answers import Usage, finish_of
from flashrt.server.chat import Shape
from flashrt.server.deltas import Delta, Deltas, silent_marks
from flashrt.server.job import Came, Ended, Event


@dataclass(frozen=True)
class _Kind:
    """An item of text: its type, that of its part, and the beginning of its ids."""

    item: str
    part: str
    prefix: str


_KINDS = {
    "reasoning_content": _Kind("reasoning", "reasoning_text", "rs"),
    "content": _Kind("message", "output_text", "msg"),
}


class ResponseAnswers:
    """See `desk.Answers`. `said`: what the response repeats of its request.

    It does not repeat instructions and tools, which may be as long as a body.
    """

    named = True

    def __init__(self, shape: Shape, usage: Usage, said: dict[str, Any]) -> None:
        self.usage = usage
        self._deltas = Deltas(shape.style)
        self._marks = silent_marks(shape.tokenizer)
        self._events = self._thoughts = 0  # told so far, and tokens in which a thought came
        self._open: _Kind | None = None  # the kind of the last item, while text is added to it
        self._text: list[str] = []  # of that item
        self._output: list[dict[str, Any]] = []
        self._response: dict[str, Any] = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "model": shape.name,
            "error": None,
            "incomplete_details": None,
            "output": self._output,
            "previous_response_id": None,
            "store": False,
            "tools": [],
            "truncation": "disabled",
            "usage": None,
            **said,
        }

    def first(self) -> Iterator[dict[str, Any]]:
        for name in ("created", "in_progress"):
            yield self._event(f"response.{name}", response=dict(self._response))

    def chunks(self, event: Event) -> Iterator[dict[str, Any]]:
        if isinstance(event, Came):
            deltas = list(self._deltas.push(event.token.text + self._marks.get(event.token.id, "")))
            self._thoughts += any("reasoning_content" in delta for delta in deltas)
            for delta in deltas:
                yield from self._delta(delta)
        elif isinstance(event, Ended):
            self.usage.add(event.report)
            for delta in self._deltas.push("", last=True):
                yield from self._delta(delta)
            cut = finish_of(event.report) == "length"
            status = "incomplete" if cut else "completed"
            yield from self._close(status)
            self._response |= {
                "status": status,
                "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
                "usage": self._usage(),
            }
            yield self._event(f"response.{status}", response=self._response)

    def last(self) -> dict[str, Any]:
        raise AssertionError("the last event has the usage")

    def collect(self, chunk: dict[str, Any]) -> None:
        """The response is built by its events."""

    def whole(self) -> dict[str, Any]:
        return self._response

    def _delta(self, delta: Delta) -> Iterator[dict[str, Any]]:
        for call in delta.get("tool_calls", []):
            yield from self._close()
            yield from self._call(call)
        for name, kind in _KINDS.items():
            if name in delta:
                if self._open is not kind:
                    yield from self._close()
                    yield from self._begin(kind)
                self._text.append(delta[name])
                yield self._of_part(f"response.{kind.part}.delta", delta=delta[name], **_logprobs(kind))

    def _begin(self, kind: _Kind) -> Iterator[dict[str, Any]]:
        self._open, self._text = kind, []
        own: dict[str, Any] = {"role": "assistant"} if kind.item == "message" else {"summary": []}
        yield self._add({"type": kind.item, "id": _id(kind.prefix), "status": "in_progress", "content": [], **own})
        yield self._of_part("response.content_part.added", part=_part(kind, ""))

    def _close(self, status: str = "completed") -> Iterator[dict[str, Any]]:
        """End the item to which text was added."""
        kind = self._open
        if kind is None:
            return
        self._open, text = None, "".join(self._text)
        yield self._of_part(f"response.{kind.part}.done", text=text, **_logprobs(kind))
        yield self._of_part("response.content_part.done", part=_part(kind, text))
        self._output[-1] |= {"status": status, "content": [_part(kind, text)]}
        yield self._done()

    def _call(self, call: dict[str, Any]) -> Iterator[dict[str, Any]]:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        item = {"type": "function_call", "id": _id("fc"), "call_id": call["id"], "name": name, "arguments": ""}
        yield self._add({**item, "status": "in_progress"})
        yield self._of_item("response.function_call_arguments.delta", delta=arguments)
        yield self._of_item("response.function_call_arguments.done", name=name, arguments=arguments)
        self._output[-1] |= {"arguments": arguments, "status": "completed"}
        yield self._done()

    def _add(self, item: dict[str, Any]) -> dict[str, Any]:
        self._output.append(item)
        return self._event("response.output_item.added", output_index=len(self._output) - 1, item=dict(item))

    def _done(self) -> dict[str, Any]:
        return self._event("response.output_item.done", output_index=len(self._output) - 1, item=dict(self._output[-1]))

    def _of_part(self, kind: str, **fields: Any) -> dict[str, Any]:
        return self._of_item(kind, content_index=0, **fields)

    def _of_item(self, kind: str, **fields: Any) -> dict[str, Any]:
        return self._event(kind, item_id=self._output[-1]["id"], output_index=len(self._output) - 1, **fields)

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._events += 1
        return {"type": kind, "sequence_number": self._events - 1, **fields}

    def _usage(self) -> dict[str, Any]:
        prompt, new = self.usage.prompt, self.usage.completion
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": self.usage.cached},
            "output_tokens": new,
            "output_tokens_details": {"reasoning_tokens": self._thoughts},
            "total_tokens": prompt + new,
        }


def _id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def _logprobs(kind: _Kind) -> dict[str, Any]:
    return {"logprobs": []} if kind.item == "message" else {}


def _part(kind: _Kind, text: str) -> dict[str, Any]:
    return {"type": kind.part, "text": text, **({"annotations": [], "logprobs": []} if kind.item == "message" else {})}
