"""Tokens for an event loop, and conversations."""

from __future__ import annotations

import asyncio
import pickle

import pytest

from flashrt.config import Sampling
from flashrt.errors import UsageError
from flashrt.text.conversation import encode_conversation
from flashrt_kernels.rows import Codec
from tests.engine.support import make_pack, tiny_engine
from tests.families import tiny_checkpoint

PROMPT = list(range(5, 25))
MESSAGES = [{"role": "user", "content": "the ring and on"}]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    root = tmp_path_factory.mktemp("async")
    _, checkpoint = tiny_checkpoint("llama", root / "checkpoint", seed=3)
    with tiny_engine(make_pack(checkpoint, root / "pack", Codec.INT8), 1.0) as engine:
        yield engine


def test_tokens_come_while_the_loop_goes_on(engine):
    expected = [token.id for token in engine.generate(PROMPT, 24, ignore_eos=True)]
    beats = [0]

    async def beat() -> None:
        while True:
            beats[0] += 1
            await asyncio.sleep(0)

    async def main() -> list[int]:
        heart = asyncio.create_task(beat())
        generation = engine.agenerate(PROMPT, 24, ignore_eos=True)
        found = [token.id async for token in generation]
        heart.cancel()
        assert generation.report.token_ids == found
        return found

    assert asyncio.run(main()) == expected
    assert beats[0] > 24


def test_two_at_a_time_take_turns(engine):
    expected = [[token.id for token in engine.generate(PROMPT[i:], 16, ignore_eos=True)] for i in range(3)]

    async def one(i: int) -> list[int]:
        return [token.id async for token in engine.agenerate(PROMPT[i:], 16, ignore_eos=True)]

    async def main() -> list[list[int]]:
        return list(await asyncio.gather(*map(one, range(3))))

    assert asyncio.run(main()) == expected


def test_one_that_is_closed_or_cancelled_leaves_the_engine_usable(engine):
    expected = [token.id for token in engine.generate(PROMPT, 24, ignore_eos=True)]

    async def closed() -> None:
        generation = engine.agenerate(PROMPT, 70, ignore_eos=True)
        async for _ in generation:
            break
        await generation.aclose()
        await generation.aclose()
        assert generation.report.finish_reason == "interrupted"
        assert [token async for token in generation] == []

    async def cancelled() -> None:
        async def endless() -> None:
            async for _ in engine.agenerate(PROMPT, 70, ignore_eos=True):
                pass

        task = asyncio.create_task(endless())
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def dropped() -> None:
        async for _ in engine.agenerate(PROMPT, 70, ignore_eos=True):
            break

    for leave in (closed, cancelled, dropped):
        asyncio.run(leave())
        assert [token.id for token in engine.generate(PROMPT, 24, ignore_eos=True)] == expected


def test_errors_reach_who_awaits(engine):
    with pytest.raises(UsageError, match="empty"):
        engine.agenerate("")

    async def superseded() -> None:
        generation = engine.agenerate(PROMPT, 50, ignore_eos=True)
        await generation.__anext__()
        generation._generation._engine.turns.begin(None)
        async for _ in generation:
            pass

    with pytest.raises(UsageError, match="another generation"):
        asyncio.run(superseded())


def test_a_chat_is_its_template(engine):
    ids = encode_conversation(engine.tokenizer, engine.tokenizer.chat_template, MESSAGES)
    expected = [token.id for token in engine.generate(ids, 8, Sampling())]
    generation = engine.chat(MESSAGES, 8, Sampling())
    assert [token.id for token in generation] == expected
    longer = [*MESSAGES, {"role": "assistant", "content": generation.report.text}, *MESSAGES]
    again = engine.chat(longer, 4, Sampling())
    list(again)
    assert again.report.resumed_tokens > 0

    async def main() -> list[int]:
        return [token.id async for token in engine.achat(MESSAGES, 8, Sampling())]

    assert asyncio.run(main()) == expected
    drawn = Sampling(temperature=1.5, seed=1)
    assert [t.id for t in engine.chat(MESSAGES, 8, drawn)] == [t.id for t in engine.generate(ids, 8, drawn)]


def test_a_report_is_pickled(engine):
    generation = engine.generate(PROMPT, 4)
    list(generation)
    assert pickle.loads(pickle.dumps(generation.report)) == generation.report
