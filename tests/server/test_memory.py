"""The budget holds the server too: under requests of all kinds, and over many of them."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.server.conftest import Server, Start, user

MIB = 1 << 20


def smallest(start: Start, pack: Path) -> float:
    """The smallest budget, in GiB, that a server accepts."""
    server = start(pack, "--budget-gb", 0.03, "--context", 2048, ready=False)
    server.process.wait(60)
    server.stop()
    found = re.search(r"smallest that would do is ([\d.]+) GiB", "".join(server.log))
    assert found, server.log
    return float(found[1])


def mixed(server: Server, i: int) -> None:
    """One of many kinds of requests; what is refused or given up is as good as any."""
    client = server.client(timeout=0.5 if i % 11 == 7 else 120.0)
    fields: dict[str, Any] = {"model": server.name, "max_tokens": 30 + i % 50}
    try:
        if i % 5 == 0:
            client.completions.create(prompt=[[5 + i % 100] * 700] * 2, echo=True, logprobs=5, **fields)
        elif i % 5 == 1:
            messages = user("the ring " * 4 * (i % 40))
            list(
                client.chat.completions.create(messages=messages, stream=True, logprobs=True, top_logprobs=20, **fields)
            )
        elif i % 5 == 2:
            client.completions.create(prompt="on and on " * 60_000, **fields)
        elif i % 5 == 3:
            client.chat.completions.create(messages=user("in " * (i % 300)), n=3, temperature=1.0, **fields)
        else:
            client.completions.create(prompt="x" * 1_040_000, **fields)
    except openai.InternalServerError as error:
        if error.status_code != 503:  # too many bodies at a time
            raise
    except (openai.BadRequestError, openai.APITimeoutError, openai.RateLimitError):
        pass


@pytest.mark.slow
@pytest.mark.budget
def test_mixed_requests_stay_within_the_smallest_budget(start: Start, packs: Any) -> None:
    pack = packs("qwen3", num_hidden_layers=8, max_position_embeddings=1 << 14)
    budget = smallest(start, pack)
    server = start(pack, "--budget-gb", budget, "--context", 2048, "--threads", 2)
    with ThreadPoolExecutor(8) as clients:
        list(clients.map(lambda i: mixed(server, i), range(100)))
    peak = server.metric("flashrt_resident_peak_bytes")
    assert peak <= budget * (1 << 30), f"{peak / MIB:.1f} of {budget * 1024:.1f} MiB"
    assert server.metric('flashrt_budget_bytes{owner="requests"}') > 10 * MIB
    owners = [line for line in server.get("/metrics").text.splitlines() if line.startswith("flashrt_budget_bytes{")]
    assert sum(float(line.rpartition(" ")[2]) for line in owners) == pytest.approx(budget * (1 << 30), abs=2)


@pytest.mark.slow
@pytest.mark.budget
def test_memory_is_flat(server: Server) -> None:
    sizes = []
    for i in range(100):
        fields = {"model": server.name, "messages": user(f"the ring {i} " * 5), "max_tokens": 20}
        server.client().chat.completions.create(**fields, temperature=1.0, logprobs=True)
        sizes.append(server.resident())
    assert max(sizes[50:]) - max(sizes[:50]) < MIB
