"""Answers all items of a batch together, longest first, and writes each answer when it is there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from flashrt.batch.item import Item
from flashrt.batch.output import Output
from flashrt.engine.batcher import Batcher
from flashrt.engine.request import Request
from flashrt.server.desk import Asked
from flashrt.server.job import Came, Ended, Event, Part


@dataclass(slots=True)
class State:
    """How far a run is."""

    requests: int  # to be answered
    tokens: int  # of these, at most
    answered: int = 0
    came: int = 0  # tokens
    left: int = 0  # tokens that are still to come, at most


Show = Callable[[State], None]


class Run:
    """`eos`: tokens that end a text."""

    def __init__(self, batcher: Batcher, eos: Iterable[int], output: Output, show: Show) -> None:
        self._batcher, self._eos, self._output, self._show = batcher, frozenset(eos), output, show
        self._asked: dict[int, tuple[Item, int]] = {}  # of a request: its item, and which of its parts it is
        self._parts: dict[int, int] = {}  # of an item: parts that are not over
        self._left: dict[int, int] = {}  # of a request: tokens that are still to come, at most

    def answer(self, items: list[Item]) -> State:
        """Answer what can be answered of `items`, which are taken out of the list: none is held once it is written.

        Raises DiskError and PackError, with all that is done by then in the output.
        """
        todo = sorted((item for item in items if item.asked is not None), key=lambda item: item.tokens)
        items.clear()
        state = State(len(todo), sum(_most(item) for item in todo))
        state.left = state.tokens
        waiting = self._requests(todo)
        while todo or self._batcher.busy:
            while self._batcher.free and (request := next(waiting, None)) is not None:
                self._batcher.submit(request)
            self._step(state)
            self._show(state)
        return state

    def _requests(self, items: list[Item]) -> Iterator[Request]:
        """Those of items, the last first; each is made when its turn comes."""
        while items:
            asked = (item := items.pop()).asked
            assert asked is not None
            self._parts[item.line.number] = len(asked.parts)
            for index, part in enumerate(asked.parts):
                request = self._request(asked, part)
                self._asked[id(request)] = item, index
                self._left[id(request)] = part.limit
                yield request

    def _request(self, asked: Asked, part: Part) -> Request:
        rules = asked.rules
        return Request(
            part.prompt.tolist(),
            max(part.limit, 1),  # of one that asks for none, nothing is kept
            part.sampling,
            rules.stops,
            frozenset() if rules.ignore_eos else self._eos,
            top_logprobs=rules.top_logprobs,
            grammar=rules.grammar,
        )

    def _step(self, state: State) -> None:
        """One pass, and the lines of those that are over."""
        written = []
        for update in self._batcher.step():
            key = id(update.request)
            item, index = self._asked[key]
            assert item.asked is not None
            nothing = item.asked.parts[index].limit == 0
            events: list[Event] = [] if nothing else [Came(index, token) for token in update.tokens]
            state.came += not nothing
            state.left -= self._spend(key, update.finished is not None)
            if update.finished is not None:
                # How much was copied depends on the neighbours: an answer does not say it.
                events.append(Ended(index, None if nothing else replace(update.finished, resumed_tokens=0)))
                del self._asked[key]
                self._parts[item.line.number] -= 1
            for event in events:
                for chunk in item.asked.answers.chunks(event):
                    item.asked.answers.collect(chunk)
            if not self._parts[item.line.number] and update.finished is not None:
                written.append(item.record(200, item.asked.answers.whole() | {"id": _answer_id(item)}))
                state.answered += 1
        if written:
            self._output.write(written)

    def _spend(self, key: int, over: bool) -> int:
        """Tokens that are not to come any more."""
        if over:
            return self._left.pop(key)
        spent = min(self._left[key], 1)
        self._left[key] -= spent
        return spent


def _most(item: Item) -> int:
    """Tokens of its answers."""
    assert item.asked is not None
    return sum(part.limit for part in item.asked.parts)


def _answer_id(item: Item) -> str:
    """The same in every run."""
    return f"answer-{item.line.key}"
