"""flashrt chat: its commands, messages of several lines, and what a terminal adds."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import time
from pathlib import Path

import pytest

from tests.cli.conftest import COMMAND, Cli, check_failure, environment

GREEDY = ("--temperature", 0, "--max-new-tokens", 8)


def test_retry_answers_the_last_message_again(cli: Cli, pack: Path) -> None:
    once = cli("chat", pack, *GREEDY, stdin="hello\n").stdout
    again = cli("chat", pack, *GREEDY, stdin="hello\n/retry\n")
    assert again.stdout == once * 2
    assert "the answer stays the same" in again.stderr
    drawn = ("--temperature", 2, "--max-new-tokens", 12)
    first, other = (cli("chat", pack, *drawn, "--seed", seed, stdin="hello\n").stdout for seed in (3, 4))
    assert first != other
    assert cli("chat", pack, *drawn, "--seed", 3, stdin="hello\n/retry\n").stdout == first + other
    check_failure(cli("chat", pack, *GREEDY, stdin="/retry\n"), 2, "no answer yet")


def test_system_counts_from_where_it_is_set(cli: Cli, pack: Path) -> None:
    given = cli("chat", pack, *GREEDY, "--system", "on and on", stdin="the ring\n").stdout
    plain = cli("chat", pack, *GREEDY, stdin="the ring\n").stdout
    assert given != plain
    result = cli("chat", pack, *GREEDY, stdin="/system on and on\nthe ring\n/system\n")
    assert result.stdout == given
    assert result.stderr.count("[system: on and on]") == 2
    changed = cli("chat", pack, *GREEDY, stdin="the ring\n/system on and on\n/retry\n")
    assert changed.stdout == plain + given


def test_a_saved_chat_goes_on(cli: Cli, pack: Path, tmp_path: Path) -> None:
    file, lines = tmp_path / "a chat.session", ["the thing on the other thing", "and on in the ring"]
    whole = cli("chat", pack, *GREEDY, "--system", "in", stdin="\n".join(lines)).stdout
    saved = cli("chat", pack, *GREEDY, "--system", "in", stdin=f"{lines[0]}\n/save {file}\n")
    assert f"[saved in {file}" in saved.stderr
    loaded = cli("chat", pack, *GREEDY, "--stats", stdin=f"/load {file}\n{lines[1]}\n/system\n")
    assert saved.stdout + loaded.stdout == whole
    assert "[1 messages and their answers" in loaded.stderr
    assert "[system: in]" in loaded.stderr
    assert re.search(r"[1-9]\d* of \d+ prompt tokens resumed|first after", loaded.stderr)
    check_failure(cli("chat", pack, stdin=f"/save {file}\n"), 2, "nothing to save yet")
    check_failure(cli("chat", pack, stdin="/save\n"), 2, "nothing to save yet")
    check_failure(cli("chat", pack, stdin="/load\n"), 2, "/load needs the name of a file")
    check_failure(cli("chat", pack, stdin="/load none\n"), 1, "none")
    file.write_bytes(b"something else")
    check_failure(cli("chat", pack, stdin=f"/load {file}\n"), 1, "a chat.session")


def test_a_message_of_several_lines(cli: Cli, pack: Path) -> None:
    file = Path(__file__)
    result = cli("chat", pack, *GREEDY, stdin='"""\nthe ring\n\nand on\n"""\nhello\n')
    asked = cli("run", pack, "-n", 8, "--prompt", "the ring\n\nand on").stdout
    assert result.stdout.startswith(asked)
    assert cli("chat", pack, *GREEDY, stdin='"""the ring\n\nand on"""\nhello\n').stdout == result.stdout
    assert cli("chat", pack, *GREEDY, stdin='"""hello"""\n').stdout == cli("chat", pack, *GREEDY, stdin="hello").stdout
    check_failure(cli("chat", pack, *GREEDY, stdin='"""\nthe ring\n'), 2, "stdin ends within a message")
    assert cli("chat", pack, *GREEDY, stdin=f"{file} is a path\n").stdout  # and no command


def test_unknown_commands_are_refused(cli: Cli, pack: Path) -> None:
    check_failure(cli("chat", pack, stdin="/sytem be kind\n"), 2, "no command /sytem", "/help")
    result = cli("chat", pack, stdin="/help\n/exit\nnever\n")
    assert (result.returncode, result.stdout) == (0, "")
    for command in ("/retry", "/system", "/save", "/load", "/reset", "/exit"):
        assert command in result.stderr


class Terminal:
    """A chat in a terminal of its own."""

    def __init__(self, pack: Path, home: Path) -> None:
        self.main, side = pty.openpty()
        variables = environment(home / "cache") | {"XDG_STATE_HOME": str(home), "TERM": "dumb"}
        command = [*COMMAND, "chat", str(pack), *map(str, GREEDY)]
        self.process = subprocess.Popen(command, stdin=side, stdout=side, stderr=side, env=variables)
        os.close(side)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self.main, text.encode())

    def expect(self, text: str, times: int = 1) -> None:
        end = time.monotonic() + 60
        while self.shown.count(text) < times:
            assert time.monotonic() < end, self.shown
            if select.select([self.main], [], [], 1)[0]:
                self.shown += os.read(self.main, 4096).decode(errors="replace")

    def leave(self) -> None:
        self.type("\x04")
        assert self.process.wait(timeout=60) == 0
        os.close(self.main)


def test_a_terminal_has_pastes_a_status_and_a_history(pack: Path, tmp_path: Path) -> None:
    pytest.importorskip("readline")
    terminal = Terminal(pack, tmp_path)
    terminal.expect("/help lists commands")
    terminal.type("\x1b[200~the ring\nand on\x1b[201~\r")  # what a terminal sends of a paste
    terminal.expect(" tokens · memory ")
    terminal.type("/nothing\r")
    terminal.expect("error: there is no command /nothing")
    terminal.leave()
    assert terminal.shown.count(" tokens · memory ") == 1  # the paste was one message
    history = tmp_path / "flashrt" / "chat-history"
    assert "/nothing" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0
    again = Terminal(pack, tmp_path)
    again.expect("/help lists commands")
    again.type("\x1b[A\r")  # the line before
    again.expect("error: there is no command /nothing")
    again.leave()
