"""Jobs that wait, and what answers may take."""

from __future__ import annotations

import asyncio
from array import array

import pytest

from flashrt.config import Sampling
from flashrt.server.errors import ApiError
from flashrt.server.job import Job, Part, Rules
from flashrt.server.memory import RESULT_BYTES, most_tokens, result_bytes
from flashrt.server.queue import JobQueue


def test_clients_that_have_gone_keep_nobody_from_waiting() -> None:
    async def waiting() -> None:
        queue = JobQueue(2)
        jobs = [Job(client, [], Rules()) for client in "aab"]
        queue.put(jobs[0])
        queue.put(jobs[1])
        with pytest.raises(ApiError, match="2 requests wait already"):
            queue.put(jobs[2])
        jobs[1].cancel()
        queue.put(jobs[2])
        assert [queue.take(), queue.take()] == [jobs[0], jobs[2]]
        assert queue.length == 0

    asyncio.run(waiting())


@pytest.mark.parametrize("answers", [1, 4, 16])
@pytest.mark.parametrize("top", [None, 0, 20])
def test_answers_of_no_stated_length_fit(answers: int, top: int | None) -> None:
    parts = [Part(array("i", [1]), most_tokens(answers, top), Sampling())] * answers
    assert 0.9 * RESULT_BYTES < result_bytes(parts, top) <= RESULT_BYTES
