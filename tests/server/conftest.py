"""Servers in processes of their own, on free ports, with tiny models."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from openai import OpenAI

from tests.cli.conftest import COMMAND, environment
from tests.families import tiny_checkpoint

KEY = "a key of tests".replace(" ", "-")


class Server:
    """A `flashrt serve` that listens. `base` is its address; `log` what it has written to stderr so far.

    `name` is that of its model, once that is loaded.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.name = process, ""
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.base = self._wait(r"listening on (\S+)")
        self.port = int(self.base.rpartition(":")[2])

    def ready(self) -> Server:
        self.name = self._wait(r"ready: (\S+),")
        return self

    def client(self, **options: Any) -> OpenAI:
        options = {"api_key": KEY, "max_retries": 0, "timeout": 60.0} | options
        return OpenAI(base_url=f"{self.base}/v1", **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        options = {"timeout": 60.0} | options
        return httpx.post(f"{self.base}{path}", **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(f"{self.base}{path}", timeout=60.0, **options)

    def metric(self, name: str) -> float:
        """The value of a metric with these labels."""
        lines = self.get("/metrics").text.splitlines()
        return float(next(line.rpartition(" ")[2] for line in lines if line.startswith(f"{name} ")))

    def resident(self) -> int:
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(60)
        self._reader.join(10)
        return status

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)

    def _wait(self, pattern: str) -> str:
        until = time.monotonic() + 120
        while time.monotonic() < until:
            for line in list(self.log):
                if found := re.search(pattern, line):
                    return found[1]
            assert self.process.poll() is None, self.log
            time.sleep(0.02)
        raise AssertionError(f"no {pattern} in {self.log}")


Start = Callable[..., Server]


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start a server, ready unless `ready` is False; what is left at the end is stopped."""
    cache = tmp_path_factory.mktemp("cache")
    with ExitStack() as servers:

        def begin(
            pack: Path, *arguments: object, ready: bool = True, env: dict[str, str] | None = None, **options: Any
        ) -> Server:
            command = [*COMMAND, "serve", str(pack), "--port", "0", "--cache-dir", str(cache), *map(str, arguments)]
            process = subprocess.Popen(
                command, stderr=subprocess.PIPE, text=True, env=environment(cache) | (env or {}), **options
            )
            servers.enter_context(process)
            servers.callback(process.kill)
            server = Server(process)
            return server.ready() if ready else server

        yield begin


@pytest.fixture(scope="session")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Pack a tiny model of a family, once for each set of overrides."""
    made: dict[str, Path] = {}
    root = tmp_path_factory.mktemp("server")

    def pack(family: str = "llama", template: str | None = None, **overrides: Any) -> Path:
        key = f"{family}{template}{sorted(overrides.items())}"
        if key not in made:
            checkpoint = tiny_checkpoint(family, root / f"checkpoint{len(made)}", **overrides)[1]
            if template is not None:
                settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
                settings["chat_template"] = template
                (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))
            made[key] = root / f"tiny{len(made)}"
            done = subprocess.run(
                [*COMMAND, "pack", str(checkpoint), str(made[key]), "--dtype", "f32"],
                capture_output=True,
                env=environment(root),
                check=False,
            )
            assert done.returncode == 0, done.stderr
        return made[key]

    return pack


@pytest.fixture(scope="session")
def tiny(packs: Callable[..., Path]) -> Path:
    """A Llama with a context of 256 tokens."""
    return packs()


@pytest.fixture(scope="session")
def slow(packs: Callable[..., Path]) -> Path:
    """A model with many layers, and a context that takes minutes to fill."""
    return packs("qwen3", num_hidden_layers=40, max_position_embeddings=1 << 16)


@pytest.fixture(scope="session")
def server(start: Start, tiny: Path) -> Server:
    """For whoever leaves it as it was."""
    return start(tiny, "--threads", 2)


@pytest.fixture(scope="session")
def slow_server(start: Start, slow: Path) -> Server:
    """One request of thousands of tokens keeps it busy. Two may wait."""
    return start(slow, "--threads", 2, "--context", 20000, "--queue", 2)


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]
