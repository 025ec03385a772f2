"""Whatever a client sends, it gets one answer of the right kind, and the next client gets its text."""

from __future__ import annotations

import json
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import Server, Start, user

CHAT, JSON = "/v1/chat/completions", {"content-type": "application/json"}


@pytest.fixture(autouse=True)
def unharmed(server: Server) -> Iterator[None]:
    """Afterwards the next request is served, and the log has said nothing of a client's."""
    before = len(server.log)
    yield
    reply = server.post(CHAT, json={"model": server.name, "messages": user("on"), "max_tokens": 2})
    assert reply.status_code == 200
    said = "".join(server.log[before:])
    assert "Traceback" not in said
    assert "internal error" not in said
    assert "attack" not in said


def raw(server: Server, data: bytes, wait: float = 5.0) -> bytes:
    """What a connection that sends this gets back."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=wait) as connection:
        connection.sendall(data)
        found = b""
        try:
            connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(65536):
                found += part
        except OSError:  # the server has hung up, or says nothing
            pass
        return found


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"attack",
        b"null",
        b"[]",
        b'{"model": "attack\xff"}',
        b"\xff\xfe{}",
        b'{"model": "\\ud800"}',
        b'{"model": NaN}',
        b"[" * 100_000,
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b'{"messages": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"messages": [{"role": "user", "content": ' + b'["x", ' * 400 + b"1" + b"]" * 400 + b"}]}",
        b'{"model": "m", "model": 5}',
        b'{"seed": 1' + b"0" * 10_000 + b"}",
    ],
    ids=range(14),
)
def test_bodies_that_are_no_request(server: Server, body: bytes) -> None:
    for path in (CHAT, "/v1/completions", "/tokenize"):
        reply = server.post(path, content=body, headers=JSON)
        assert reply.status_code == 400, reply.text
        assert reply.json()["error"]["type"] == "invalid_request_error"


def test_a_body_that_is_too_long(server: Server) -> None:
    body = json.dumps({"model": server.name, "messages": user("attack " * 200_000)})
    assert server.post(CHAT, content=body, headers=JSON).status_code == 413
    chunked = (body.encode()[i : i + 65536] for i in range(0, len(body), 65536))
    assert server.post(CHAT, content=chunked, headers=JSON).status_code == 413
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    assert b" 413 " in raw(server, head + b"Content-Length: 99999999999999999999\r\n\r\n")
    assert b" 400 " in raw(server, head + b"Content-Length: -5\r\n\r\n")


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/v1/models/../../../etc/passwd",
        "/v1/models/%2e%2e%2fetc",
        "/attack\r\n",
        "//",
        "/v1",
        "/%00",
    ],
)
def test_paths_reach_nothing(server: Server, path: str) -> None:
    reply = raw(server, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    assert reply.split(b" ")[1] in (b"404", b"400")
    assert b"root:" not in reply


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "multipart/form-data"])
def test_what_a_page_elsewhere_may_send_is_refused(server: Server, kind: str) -> None:
    reply = server.post(CHAT, content=b"{}", headers={"content-type": kind})
    assert reply.status_code == 415


@pytest.mark.parametrize("host", ["attack.example", "attack.example:8000", "10.0.0.1", "localhost.attack.example", ""])
def test_names_of_other_machines_are_refused(server: Server, host: str) -> None:
    assert b" 403 " in raw(server, f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())


def test_headers_stay_headers(server: Server) -> None:
    fields = {"model": "m\r\nSet-Cookie: attack=1", "messages": user("on")}
    reply = server.post(CHAT, json=fields)
    assert reply.status_code == 404
    assert "set-cookie" not in reply.headers
    lines = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-A: 1\x00\r\nConnection: close\r\n\r\n"
    assert b" 400 " in raw(server, lines)
    many = b"".join(b"X-%d: attack\r\n" % i for i in range(9000))
    reply = raw(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + many + b"\r\n")
    assert reply[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 431", b"")  # it may hang up before it was sent everything


def test_templates_are_not_filled_by_messages(server: Server) -> None:
    text = "{{ 7 * 7 }}{% for x in messages %}attack{% endfor %}"
    fields = {"model": server.name, "messages": user(text)}
    ids = server.post("/tokenize", json=fields).json()["tokens"]
    assert len(ids) > len(text) / 2


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS", "TRACE"])
def test_other_methods_are_refused(server: Server, method: str) -> None:
    reply = raw(server, f"{method} {CHAT} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    assert b" 405 " in reply


@pytest.mark.slow
def test_connections_that_say_nothing_hold_nobody_up(start: Start, tiny: Path) -> None:
    """Nor those that never come to an end of their headers, or of their body."""
    server = start(tiny)
    silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(40)]
    for i, connection in enumerate(silent):
        if i % 3:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-A:")
        if i % 3 == 2:
            connection.sendall(b" 1\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{")
    assert server.get("/health").status_code == 200
    until = time.monotonic() + 60
    for connection in silent:
        connection.settimeout(max(until - time.monotonic(), 1.0))
        while connection.recv(65536):  # 408 of a body, the end of a connection otherwise
            pass
        connection.close()
    assert server.get("/health").status_code == 200


def test_random_requests_get_answers(server: Server) -> None:
    """Fields of requests with values of all kinds: 200 or 4xx, and JSON."""
    generator = random.Random(3)
    names = [
        *("model", "messages", "prompt", "max_tokens", "temperature", "top_p", "n", "stop", "stream", "seed", "echo"),
        *("logprobs", "top_logprobs", "logit_bias", "stream_options", "tools", "response_format", "user", "\u0000"),
    ]

    def value(depth: int = 0) -> Any:
        kind = generator.randrange(9 if depth < 3 else 7)
        if kind == 7:
            return [value(depth + 1) for _ in range(generator.randrange(4))]
        if kind == 8:
            return {generator.choice(["role", "content", "type", "5"]): value(depth + 1) for _ in range(3)}
        return [
            None,
            True,
            generator.randrange(-5, 50),
            generator.random() * 3,
            "on",
            "\u0000\ud7ff\U0001f600",
            server.name,
        ][kind]

    for _ in range(400):
        fields = {name: value() for name in generator.sample(names, generator.randrange(8))}
        fields |= {"model": server.name, "max_tokens": 2} if generator.random() < 0.8 else {}
        fields |= {"prompt": "on"} if generator.random() < 0.5 else {}
        reply = server.post(generator.choice(["/v1/completions", CHAT, "/tokenize"]), json=fields)
        assert reply.status_code in (200, 400, 404), (fields, reply.text)
        if not reply.headers["content-type"].startswith("text/event-stream"):
            json.loads(reply.text)
