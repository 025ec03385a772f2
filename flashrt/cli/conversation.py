"""A conversation in a model's chat template: its messages, and the engine that answers them."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field, replace
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

from flashrt.cli.console import say, write
from flashrt.config import Sampling
from flashrt.errors import UsageError
from flashrt.text.conversation import encode_conversation

if TYPE_CHECKING:
    from flashrt.engine.engine import Engine
    from flashrt.engine.report import Report
    from flashrt.storage.session_file import Messages
    from flashrt.text.template import ChatTemplate


@dataclass
class Conversation:
    """Messages so far, and the engine that answers them."""

    engine: Engine
    template: ChatTemplate
    sampling: Sampling
    system: str | None
    max_new_tokens: int | None
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.messages = _opening(self.system)

    def resume(self, messages: Messages | None) -> None:
        """Go on with the messages of a session; nothing for None. Raises UsageError where they had another system."""
        if not messages:
            return
        system = messages[0]["content"] if messages[0]["role"] == "system" else None
        if self.system not in (None, system):
            raise UsageError("the session began with another system message: leave --system out, or name another file")
        self.take(messages)

    def take(self, messages: Messages) -> None:
        """These messages, system message included, in place of those so far."""
        self.messages = [dict(message) for message in messages]
        first = self.messages[:1]
        self.system = first[0]["content"] if first and first[0]["role"] == "system" else None

    def instruct(self, system: str) -> None:
        """Another system message for what follows; the messages stay."""
        begin = 0 if self.system is None else 1
        self.messages = [*_opening(system), *self.messages[begin:]]
        self.system = system

    def answer(self, text: str) -> Report:
        """Answer one message, printing the answer as it comes.

        Raises UsageError, and forgets the message, when it does not fit in what is left of the context.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = encode_conversation(self.engine.tokenizer, self.template, messages)
        room = self.engine.plan.context - len(ids)
        if room < 1:
            raise UsageError(
                f"the conversation has {len(ids)} tokens, the context is {self.engine.plan.context}: "
                "start over with /reset, or use a larger --context"
            )
        limit = min(self.max_new_tokens or room, room)
        generation = self.engine.generate(ids, limit, self.sampling, reuse=True)
        with _Interrupt() as interrupt:
            for token in generation:
                write(token.text)
                if interrupt.asked:
                    break
        generation.close()
        write("\n")
        report = generation.report
        self.messages = [*messages, {"role": "assistant", "content": report.text}]
        if report.finish_reason == "length" and limit == room:
            say("[the context is full: start over with /reset, or use a larger --context]")
        return report

    def retry(self) -> Report:
        """Answer the last message again, with other draws where a seed was given. Raises UsageError without one."""
        before, sampling = self.messages, self.sampling
        if not before or before[-1]["role"] != "assistant":
            raise UsageError("there is no answer yet that another could replace")
        if sampling.seed is not None:
            self.sampling = replace(sampling, seed=sampling.seed + 1)
        self.messages = before[:-2]
        try:
            return self.answer(before[-2]["content"])
        except BaseException:
            self.messages, self.sampling = before, sampling
            raise


def _opening(system: str | None) -> list[dict[str, str]]:
    return [] if system is None else [{"role": "system", "content": system}]


class _Interrupt:
    """Ctrl-C asks for a stop after the token under way, so that the engine is left fit for the next message.

    A second Ctrl-C raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> _Interrupt:
        self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
