"""Queue, time, cancelling and stopping, with a model that takes its time."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest

from tests.server.conftest import Server, Start, user

CHAT = "/v1/chat/completions"


def body(server: Server, tokens: int, **fields: Any) -> dict[str, Any]:
    text = fields.pop("text", "on and on in the ring")
    return {"model": server.name, "messages": user(text), "max_tokens": tokens, "ignore_eos": True} | fields


def until(what: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


def idle(server: Server) -> bool:
    return server.metric("flashrt_requests_running") == server.metric("flashrt_requests_waiting") == 0


class Long:
    """A stream of thousands of tokens, read by a thread until it is closed."""

    def __init__(self, server: Server, tokens: int = 15000, **fields: Any) -> None:
        self._client = httpx.Client(timeout=60.0)
        request = self._client.build_request(
            "POST", f"{server.base}{CHAT}", json=body(server, tokens, stream=True, **fields)
        )
        self.reply = self._client.send(request, stream=True)
        assert self.reply.status_code == 200, self.reply.read()
        self.lines = self.reply.iter_lines()  # kept: without it the reply is closed

    def close(self) -> None:
        self.reply.close()
        self._client.close()


def in_threads(calls: list[Callable[[], Any]]) -> list[threading.Thread]:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    return threads


def test_a_client_that_goes_away_ends_its_generation(slow_server: Server) -> None:
    server = slow_server
    stream = Long(server)
    assert next(stream.lines).startswith("data: ")
    until(lambda: server.metric("flashrt_requests_running") == 1)
    stream.close()
    until(lambda: idle(server))
    assert server.metric("flashrt_generated_tokens_total") < 10000
    with pytest.raises(openai.APITimeoutError):
        server.client(timeout=1.0).chat.completions.create(model=server.name, messages=user("on"), max_tokens=15000)
    until(lambda: idle(server))


def test_a_client_that_goes_away_ends_its_prompt(slow_server: Server) -> None:
    server = slow_server
    with pytest.raises(openai.APITimeoutError):
        server.client(timeout=2.0).chat.completions.create(
            model=server.name, messages=user("on the ring " * 1200), max_tokens=5
        )
    until(lambda: idle(server), 30)


def test_more_than_may_wait_are_told_when_to_ask_again(slow_server: Server) -> None:
    server = slow_server
    stream = Long(server)
    found: list[int] = []

    def ask() -> None:
        found.append(server.post(CHAT, json=body(server, 1)).status_code)

    threads = in_threads([ask, ask])
    until(lambda: server.metric("flashrt_requests_waiting") == 2)
    refused = server.post(CHAT, json=body(server, 1))
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.json()["error"]["type"] == "rate_limit_error"
    stream.close()
    for thread in threads:
        thread.join(60)
    assert found == [200, 200]


def test_comments_keep_a_stream_alive_while_a_prompt_is_computed(slow_server: Server) -> None:
    """The second request waits for the first."""
    server = slow_server
    first = Long(server)
    next(first.lines)
    second = Long(server, tokens=2)
    lines = second.lines
    begun = [next(lines) for _ in range(3)]
    assert json.loads(begun[0][6:])["choices"][0]["delta"]["role"] == "assistant"
    assert begun[1:] == ["", ": still computing"]
    first.close()
    assert [line for line in lines if line][-1] == "data: [DONE]"
    second.close()


def test_a_client_that_reads_nothing_holds_nobody_up(slow_server: Server) -> None:
    server = slow_server
    data = json.dumps(body(server, 300, stream=True, logprobs=True, top_logprobs=20)).encode()
    fields = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    head = f"POST {CHAT} HTTP/1.1\r\n{fields}"
    with socket.create_connection(("127.0.0.1", server.port)) as silent:
        silent.sendall(head.encode() + data)
        time.sleep(0.3)
        assert server.post(CHAT, json=body(server, 1)).status_code == 200
    until(lambda: idle(server))


def test_a_request_that_takes_too_long_is_ended(start: Start, slow: Path) -> None:
    server = start(slow, "--threads", 2, "--context", 20000, "--timeout-s", 2)
    reply = server.post(CHAT, json=body(server, 15000))
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "timeout")
    stream = Long(server)
    events = [line for line in stream.lines if line.startswith("data: ")]
    stream.close()
    assert json.loads(events[-2][6:])["error"]["code"] == "timeout"
    assert events[-1] == "data: [DONE]"
    assert server.post(CHAT, json=body(server, 2)).status_code == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_lets_requests_end(start: Start, slow: Path, number: int) -> None:
    server = start(slow, "--threads", 2, "--context", 20000, "--grace-s", 60)
    found: list[Any] = []
    thread = in_threads([lambda: found.append(server.post(CHAT, json=body(server, 30)))])[0]
    until(lambda: server.metric("flashrt_requests_running") == 1)
    assert server.stop(number) == 0
    thread.join(60)
    assert found[0].json()["usage"]["completion_tokens"] == 30
    assert not any("Traceback" in line or "error" in line for line in server.log), server.log


def test_a_stop_cuts_what_does_not_end(start: Start, slow: Path) -> None:
    server = start(slow, "--threads", 2, "--context", 20000, "--grace-s", 0.5)
    stream = Long(server)
    lines = stream.lines
    assert next(lines).startswith("data: ")
    server.process.send_signal(signal.SIGTERM)
    events = [line for line in lines if line.startswith("data: ")]
    assert json.loads(events[-2][6:])["error"]["code"] == "cancelled"
    stream.close()
    assert server.stop() == 0
    assert not any("Traceback" in line for line in server.log), server.log


def test_a_server_that_loads_is_not_ready_and_can_be_stopped(start: Start, slow: Path) -> None:
    server = start(slow, "--threads", 2, ready=False)
    before = server.get("/health")
    assert before.status_code in (200, 503)
    server.ready()
    assert server.get("/health").json() == {"status": "ok"}
    assert server.stop() == 0
