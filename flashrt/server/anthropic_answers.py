"""Answers in Anthropic's form: blocks, and events that build them."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from flashrt.server.answers import Usage
from flashrt.server.deltas import Delta, Deltas, Style, silent_marks
from flashrt.server.job import Came, Ended, Event
from flashrt.text.tokenizer import Tokenizer

_EMPTY = {"text": {"text": ""}, "thinking": {"thinking": "", "signature": ""}}


@dataclass(frozen=True)
class MessageShape:
    name: str
    tokenizer: Tokenizer
    style: Style
    stops: tuple[str, ...]


class MessageAnswers:
    """See `desk.Answers`."""

    named = True

    def __init__(self, shape: MessageShape, usage: Usage) -> None:
        self._shape, self.usage = shape, usage
        self._deltas = Deltas(shape.style)
        self._marks = silent_marks(shape.tokenizer)
        self._index, self._open = -1, ""  # the last block, and its kind while it is open
        self._message: dict[str, Any] = {
            "id": f"msg_{uuid.uuid4().hex}",
            "type": "message",
            "role": "assistant",
            "model": shape.name,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }

    def first(self) -> Iterator[dict[str, Any]]:
        yield {"type": "message_start", "message": self._message | {"content": [], "usage": self._usage()}}

    def chunks(self, event: Event) -> Iterator[dict[str, Any]]:
        if isinstance(event, Came):
            for delta in self._deltas.push(event.token.text + self._marks.get(event.token.id, "")):
                yield from self._block(delta)
        elif isinstance(event, Ended):
            self.usage.add(event.report)
            for delta in self._deltas.push("", last=True):
                yield from self._block(delta)
            yield from self._close()
            yield {"type": "message_delta", "delta": self._reason(event), "usage": self._usage()}
            yield {"type": "message_stop"}

    def last(self) -> dict[str, Any]:
        return {"type": "ping"}

    def collect(self, chunk: dict[str, Any]) -> None:
        content = self._message["content"]
        if chunk["type"] == "content_block_start":
            content.append(dict(chunk["content_block"]))
        elif chunk["type"] == "content_block_delta":
            kind, value = next((k, v) for k, v in chunk["delta"].items() if k != "type")
            if kind == "partial_json":
                content[-1]["input"] = json.loads(value)
            else:
                content[-1][kind] += value
        elif chunk["type"] == "message_delta":
            self._message |= chunk["delta"]

    def whole(self) -> dict[str, Any]:
        return self._message | {"usage": self._usage()}

    def _block(self, delta: Delta) -> Iterator[dict[str, Any]]:
        """A delta as one of the block that is open, or of a new one."""
        for call in delta.get("tool_calls", []):
            yield from self._close()
            block = {"type": "tool_use", "id": call["id"], "name": call["function"]["name"], "input": {}}
            yield self._start("tool_use", block)
            yield self._delta({"type": "input_json_delta", "partial_json": call["function"]["arguments"]})
            yield from self._close()
        for kind, name in (("thinking", "reasoning_content"), ("text", "content")):
            if name in delta:
                if self._open != kind:
                    yield from self._close()
                    yield self._start(kind, {"type": kind, **_EMPTY[kind]})
                yield self._delta({"type": f"{kind}_delta", kind: delta[name]})

    def _start(self, kind: str, block: dict[str, Any]) -> dict[str, Any]:
        self._index, self._open = self._index + 1, kind
        return {"type": "content_block_start", "index": self._index, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _close(self) -> Iterator[dict[str, Any]]:
        if self._open:
            self._open = ""
            yield {"type": "content_block_stop", "index": self._index}

    def _reason(self, event: Ended) -> dict[str, Any]:
        """Why it ended; by which of several stop sequences is not known."""
        finish = "length" if event.report is None else event.report.finish_reason
        reason = {"eos": "end_turn", "stop": "stop_sequence", "length": "max_tokens"}[finish]
        stops = self._shape.stops
        sequence = stops[0] if finish == "stop" and len(stops) == 1 else None
        return {
            "stop_reason": "tool_use" if self._deltas.calls and finish == "eos" else reason,
            "stop_sequence": sequence,
        }

    def _usage(self) -> dict[str, int]:
        cached = self.usage.cached
        return {
            "input_tokens": self.usage.prompt - cached,
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": self.usage.completion,
        }
