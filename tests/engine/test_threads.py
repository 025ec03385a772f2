"""Threads that share an engine: one request at a time, the others wait, and never a wrong token."""

from __future__ import annotations

import threading
import time

import pytest

from flashrt.errors import UsageError
from flashrt_kernels.rows import Codec
from tests.engine.support import make_pack, tiny_engine
from tests.families import tiny_checkpoint

PROMPTS = [list(range(first, first + 20)) for first in (5, 30, 60, 90)]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = tmp_path_factory.mktemp("threads")
    _, checkpoint = tiny_checkpoint("llama", root / "checkpoint", seed=3)
    return make_pack(checkpoint, root / "pack", Codec.INT8)


def in_thread(call):
    """What a call in a thread of its own returns, or the error it raises."""
    found = []

    def run() -> None:
        try:
            found.append(call())
        except Exception as error:  # handed over to the test
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    return found[0]


def text_of(engine, prompt):
    generation = engine.generate(prompt, 24, ignore_eos=True)
    return [token.id for token in generation]


def test_tokens_are_right(packed):
    with tiny_engine(packed, 0.4, max_draft_tokens=4) as engine:
        expected = [text_of(engine, prompt) for prompt in PROMPTS]
        wrong: list[object] = []
        texts = [0] * len(PROMPTS)
        start = threading.Barrier(len(PROMPTS))

        def work(i: int) -> None:
            start.wait()
            try:
                for _ in range(6):
                    if text_of(engine, PROMPTS[i]) != expected[i]:
                        wrong.append(i)
                    texts[i] += 1
            except Exception as error:
                wrong.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(PROMPTS))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not wrong
        assert texts == [6] * len(PROMPTS)


def test_requests_wait_in_order(packed):
    with tiny_engine(packed, 1.0, scoring=True) as engine:
        expected = [text_of(engine, prompt) for prompt in PROMPTS]
        over: list[object] = []
        generation = engine.generate(PROMPTS[0], 24, ignore_eos=True)
        found = [next(generation).id]

        def score() -> None:
            engine.score(PROMPTS[1], 10)
            over.append("score")

        def text() -> None:
            found_there = text_of(engine, PROMPTS[2])
            over.append(found_there)

        threads = [threading.Thread(target=score), threading.Thread(target=text)]
        for count, thread in enumerate(threads, 1):
            thread.start()
            wait_until(lambda count=count: len(engine.turns._waiting) == count)
        found.append(next(generation).id)
        assert not over
        other = threading.Thread(target=lambda: found.append(next(generation).id))  # handed to another thread
        other.start()
        other.join(60)
        found += [token.id for token in generation]
        assert found == expected[0]
        assert text_of(engine, PROMPTS[3]) == expected[3]  # behind those that waited before
        for thread in threads:
            thread.join(60)
        assert over == ["score", expected[2]]


def test_a_request_may_replace_its_threads_own_while_others_wait(packed):
    with tiny_engine(packed, 1.0) as engine:
        expected = text_of(engine, PROMPTS[1])
        first = engine.generate(PROMPTS[0], 24)
        next(first)
        found: list[object] = []
        thread = threading.Thread(target=lambda: found.append(text_of(engine, PROMPTS[1])))
        thread.start()
        wait_until(lambda: engine.turns._waiting)
        assert text_of(engine, PROMPTS[1]) == expected
        thread.join(60)
        assert found == [expected]


def test_what_is_abandoned_makes_room(packed):
    with tiny_engine(packed, 1.0) as engine:
        expected = text_of(engine, PROMPTS[1])
        generation = engine.generate(PROMPTS[0], 24)
        next(generation)
        found: list[object] = []
        thread = threading.Thread(target=lambda: found.append(text_of(engine, PROMPTS[1])))
        thread.start()
        wait_until(lambda: engine.turns._waiting)
        del generation  # nobody says so
        thread.join(60)
        assert found == [expected]


def test_closing_the_engine_ends_those_who_wait(packed):
    engine = tiny_engine(packed, 1.0)
    generation = engine.generate(PROMPTS[0], 24)
    next(generation)
    found: list[object] = []

    def wait() -> None:
        try:
            next(engine.generate(PROMPTS[1], 4))
        except UsageError as error:
            found.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    wait_until(lambda: engine.turns._waiting)
    engine.close()
    thread.join(60)
    assert len(found) == 1
    assert "closed" in found[0]


def wait_until(true) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_request_that_is_closed_makes_room(packed):
    with tiny_engine(packed, 1.0) as engine:
        generation = engine.generate(PROMPTS[0], 24)
        next(generation)
        generation.close()
        assert len(in_thread(lambda: text_of(engine, PROMPTS[1]))) == 24
        next(engine.generate(PROMPTS[0], 24))
        in_thread(engine.close)
        with pytest.raises(UsageError, match="closed"):
            next(engine.generate(PROMPTS[1], 4))
