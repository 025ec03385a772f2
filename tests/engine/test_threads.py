"""Threads that share an engine: one request at a time, the others refused, and never a wrong token."""

from __future__ import annotations

import threading

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


def test_tokens_are_right_or_refused(packed):
    with tiny_engine(packed, 0.4, max_draft_tokens=4) as engine:
        expected = [text_of(engine, prompt) for prompt in PROMPTS]
        texts, refused = [0] * len(PROMPTS), [0] * len(PROMPTS)
        wrong: list[object] = []
        start = threading.Barrier(len(PROMPTS))

        def work(i: int) -> None:
            start.wait()
            for _ in range(12):
                try:
                    if text_of(engine, PROMPTS[i]) != expected[i]:
                        wrong.append(i)
                    texts[i] += 1
                except UsageError as error:
                    if "another thread's request" not in str(error):
                        wrong.append(error)
                    refused[i] += 1
                except Exception as error:
                    wrong.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(PROMPTS))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not wrong
        assert sum(texts) > 0
        assert sum(refused) > 0
        assert sum(texts) + sum(refused) == 12 * len(PROMPTS)
        assert text_of(engine, PROMPTS[0]) == expected[0]


def test_a_request_goes_on_while_others_are_refused(packed):
    with tiny_engine(packed, 1.0, scoring=True) as engine:
        expected = text_of(engine, PROMPTS[0])
        generation = engine.generate(PROMPTS[0], 24, ignore_eos=True)
        found = [next(generation).id]
        for call in (lambda: next(engine.generate(PROMPTS[1], 4)), lambda: engine.score(PROMPTS[1], 10)):
            assert isinstance(error := in_thread(call), UsageError)
            assert "another thread's request is going on" in str(error)
        found.append(in_thread(lambda: next(generation)).id)  # handed to another thread, which has ended since
        found += [token.id for token in generation]
        assert found == expected
        assert in_thread(lambda: text_of(engine, PROMPTS[0])) == expected


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
