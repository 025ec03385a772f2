"""The installed console script, and tiny packs to run it on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flashrt.storage.manifest import _checksum
from tests.families import tiny_checkpoint

Result = subprocess.CompletedProcess[str]
Cli = Callable[..., Result]
Launch = Callable[..., "subprocess.Popen[Any]"]

SCRIPT = Path(sys.executable).with_name("flashrt")
COMMAND = [str(SCRIPT)] if SCRIPT.exists() else [sys.executable, "-m", "flashrt"]


def environment(cache: Path) -> dict[str, str]:
    """The caller's, with a cache directory of its own."""
    return os.environ | {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.fixture(scope="session")
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def cli(cache_home: Path) -> Cli:
    """Run the console script; stdin is empty unless `stdin` is given."""

    def run(*arguments: object, stdin: str | bytes = "", **options: Any) -> Result:
        data = stdin if isinstance(stdin, bytes) else stdin.encode()
        result = subprocess.run(
            [*COMMAND, *map(str, arguments)],
            input=data,
            capture_output=True,
            env=environment(cache_home),
            timeout=120,
            check=False,
            **options,
        )
        return Result(result.args, result.returncode, result.stdout.decode(), result.stderr.decode())

    return run


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Start the console script and go on, its output in pipes. It does not outlive the test.

    It can be interrupted, also where the tests themselves cannot: a job in the background of a shell ignores SIGINT.
    """
    with contextlib.ExitStack() as processes:
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        processes.callback(signal.signal, signal.SIGINT, before)

        def start(*arguments: object, **options: Any) -> subprocess.Popen[Any]:
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            command = [*COMMAND, *map(str, arguments)]
            process = subprocess.Popen(command, env=environment(tmp_path), **pipes, **options)
            processes.enter_context(process)
            processes.callback(process.kill)
            return process

        yield start


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a context of 256 tokens, as transformers saves it."""
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("checkpoints") / "tiny-llama")[1]


@pytest.fixture(scope="session")
def long_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with many layers, and a context that takes minutes to fill."""
    directory = tmp_path_factory.mktemp("checkpoints") / "tiny-long"
    return tiny_checkpoint("qwen3", directory, num_hidden_layers=40, max_position_embeddings=1 << 16)[1]


@pytest.fixture(scope="session")
def pack(cli: Cli, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packs") / "tiny-int8"
    result = cli("pack", checkpoint, out)
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="session")
def long_pack(cli: Cli, long_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packs") / "long-f32"
    result = cli("pack", long_checkpoint, out, "--dtype", "f32")
    assert result.returncode == 0, result.stderr
    return out


def set_text(pack: Path, **fields: Any) -> None:
    """Change what a pack's text.json says, as if it had been packed with that."""
    file, manifest = pack / "text.json", pack / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    body = json.loads(manifest.read_bytes())
    body.pop("checksum")
    body["text_files"]["text.json"] = hashlib.sha256(file.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(body | {"checksum": _checksum(body)}))


def check_failure(result: Result, status: int, *words: str) -> None:
    """One clear message on stderr, nothing on stdout, no traceback."""
    assert result.returncode == status, (result.returncode, result.stdout, result.stderr)
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: "), result.stderr
    assert result.stdout == ""
    for word in words:
        assert word in lines[0], (word, lines[0])
