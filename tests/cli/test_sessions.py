"""Texts and conversations that outlive the process."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.cli.conftest import Cli, Launch, check_failure

PROMPT = "the thing and the other thing on and on " * 4  # 74 tokens; the context is 256
ASK = ("-n", 20, "--ignore-eos", "--temperature", 1, "--seed", 3)


@pytest.fixture
def session(tmp_path: Path) -> Path:
    return tmp_path / "saved.session"


def resumed(stderr: str) -> int:
    """Prompt tokens that were not computed, as the closing line has it."""
    found = re.search(r"· (\d+) of \d+ prompt tokens resumed ·", stderr)
    return int(found[1]) if found else 0


def test_run_goes_on_from_its_session(cli: Cli, pack: Path, session: Path) -> None:
    plain = cli("run", pack, "--raw", "--prompt", PROMPT, *ASK)
    first = cli("run", pack, "--raw", "--prompt", PROMPT, *ASK, "--session", session)
    again = cli("run", pack, "--raw", "--prompt", PROMPT, *ASK, "--session", session, "--json")
    assert (first.returncode, again.returncode) == (0, 0), first.stderr + again.stderr
    report = json.loads(again.stdout)
    assert first.stdout == plain.stdout == report["text"] + "\n"
    assert resumed(first.stderr) == 0
    assert report["resumed_tokens"] == report["prompt_tokens"] - 17
    longer = PROMPT + report["text"] + " and " * 10
    other = cli("run", pack, "--raw", "--prompt", longer, *ASK, "--session", session)
    assert resumed(other.stderr) > report["prompt_tokens"], other.stderr


def test_an_interrupted_run_saves_what_is_there(cli: Cli, launch: Launch, long_pack: Path, session: Path) -> None:
    options = ("--prompt", PROMPT, "--ignore-eos", "--session", session, "--context", 4096)
    process = launch("run", long_pack, "--raw", *options, "-n", 3900)
    assert process.stdout is not None
    begun = process.stdout.read(10)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    again = cli("run", long_pack, "--raw", *options, "-n", 5)
    assert again.returncode == 0, again.stderr
    assert resumed(again.stderr) == 57  # all but what a wide pass takes
    assert (begun + out).decode().startswith(again.stdout[:-1])


def test_chat_goes_on_with_its_messages(cli: Cli, pack: Path, session: Path) -> None:
    options = ("--temperature", 0, "--max-new-tokens", 8, "--stats")
    lines = ["the thing on the other thing", "and on and on in the ring", "in the end"]
    whole = cli("chat", pack, *options, "--system", "in", stdin="\n".join(lines))
    parts = [cli("chat", pack, *options, "--system", "in", "--session", session, stdin=lines[0])]
    parts += [cli("chat", pack, *options, "--session", session, stdin=line) for line in lines[1:]]
    assert [part.returncode for part in parts] == [0, 0, 0], parts[-1].stderr
    assert "".join(part.stdout for part in parts) == whole.stdout
    assert [resumed(part.stderr) for part in parts] == list(map(resumed, whole.stderr.splitlines()))
    assert resumed(parts[2].stderr) > resumed(parts[1].stderr) > 0
    before = session.read_bytes()
    assert cli("chat", pack, "--session", session, stdin="").returncode == 0
    assert session.read_bytes() == before
    check_failure(cli("chat", pack, "--system", "on", "--session", session), 2, "another system message")


def test_ctrl_c_ends_a_chat_that_is_saved(cli: Cli, launch: Launch, long_pack: Path, session: Path) -> None:
    options = ("--temperature", 0, "--context", 20000, "--session", session)
    process = launch("chat", long_pack, *options, stdin=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"hello\n")
    process.stdin.flush()
    process.stdout.read(20)
    for _ in range(2):  # ends the answer, then the chat
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"error: interrupted\n")
    again = cli("chat", long_pack, *options, "--max-new-tokens", 2, "--stats", stdin="and on")
    assert again.returncode == 0, again.stderr
    found = re.search(r"(\d+) of (\d+) prompt tokens resumed", again.stderr)
    assert found, again.stderr
    assert int(found[1]) > 5
    assert int(found[2]) > 25  # the first message and what there was of its answer are part of it


def test_texts_and_conversations_do_not_replace_each_other(cli: Cli, pack: Path, session: Path) -> None:
    assert cli("run", pack, "--raw", "--prompt", PROMPT, "-n", 2, "--session", session).returncode == 0
    check_failure(cli("chat", pack, "--session", session), 2, "the session of a text", "flashrt run")
    session.unlink()
    assert cli("chat", pack, "-n", 2, "--session", session, stdin="on").returncode == 0
    failed = cli("run", pack, "--raw", "--prompt", PROMPT, "-n", 2, "--session", session)
    check_failure(failed, 2, "the session of a conversation", "flashrt chat")


def test_a_damaged_session_is_refused_and_left_alone(cli: Cli, pack: Path, session: Path) -> None:
    assert cli("run", pack, "--raw", "--prompt", PROMPT, "-n", 2, "--session", session).returncode == 0
    data = session.read_bytes()
    session.write_bytes(damaged := data[:-1] + bytes([data[-1] ^ 1]))
    check_failure(
        cli("run", pack, "--raw", "--prompt", PROMPT, "-n", 2, "--session", session), 1, "saved.session is damaged"
    )
    assert session.read_bytes() == damaged


def test_a_directory_serves_later_processes(cli: Cli, pack: Path, tmp_path: Path) -> None:
    options = (*ASK, "--session-dir", tmp_path / "kept")
    plain = cli("run", pack, "--raw", "--prompt", PROMPT, *ASK)
    results = [cli("run", pack, "--raw", "--prompt", PROMPT, *options) for _ in range(2)]
    assert [result.stdout for result in results] == [plain.stdout] * 2
    assert resumed(results[0].stderr) == 0 < resumed(results[1].stderr)
    for path in (tmp_path / "kept").glob("*.kv"):
        path.write_bytes(path.read_bytes()[:-1])
    result = cli("run", pack, "--raw", "--prompt", PROMPT, *options)
    assert (result.returncode, result.stdout) == (0, plain.stdout)
    assert re.match(r"note: .*\.kv is damaged .* computed again\n\[20 tokens", result.stderr)
    assert "Warning" not in result.stderr


def test_processes_share_a_directory(cli: Cli, launch: Launch, pack: Path, tmp_path: Path) -> None:
    """Four at once, two texts, and room for little: each gives the text that it gives alone."""
    prompts = [PROMPT, "on " + PROMPT]
    alone = [cli("run", pack, "--raw", "--prompt", prompt, *ASK).stdout for prompt in prompts]
    folder = tmp_path / "kept"
    for _ in range(2):
        options = (*ASK, "--session-dir", folder, "--session-gb", 0.0001, "--threads", 1)
        processes = [launch("run", pack, "--raw", "--prompt", prompts[i % 2], *options) for i in range(4)]
        results = [process.communicate(timeout=100) for process in processes]
        assert [process.returncode for process in processes] == [0] * 4, results
        assert [out.decode() for out, _ in results] == alone * 2
        assert all(err.count(b"\n") == 1 for _, err in results), results
    kept = list(folder.glob("*.kv"))
    assert kept
    assert sum(path.stat().st_size for path in kept) <= 0.0001 * 2**30
    assert not list(folder.glob("*.tmp"))


def test_options_that_contradict(cli: Cli, pack: Path, tmp_path: Path) -> None:
    check_failure(cli("run", pack, "--raw", "-p", "x", "--session-gb", 1), 2, "--session-gb needs --session-dir")
    check_failure(
        cli("run", pack, "--raw", "-p", "x", "--session-dir", tmp_path, "--session-gb", -1), 2, "session_gb is -1"
    )
    check_failure(cli("run", pack, "--raw", "-p", "x", "--session", tmp_path / "a", "--device", "cuda"), 2, "CPU")
    (tmp_path / "file").write_text("")
    check_failure(
        cli("run", pack, "--raw", "-p", "x", "--session-dir", tmp_path / "file"), 2, "no sessions can be kept"
    )
