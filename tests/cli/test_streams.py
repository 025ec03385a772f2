"""Streams that the caller closed or filled, as services and cron do, and Ctrl-C at any time: a clear end."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flashrt.cli.app import COMMANDS
from flashrt.storage.pack import Pack
from tests.cli.conftest import COMMAND, Launch, Result, environment

NOWHERE = "error: stdout is closed, results have nowhere to go: redirect it to a file, or to /dev/null\n"
NOTHING = "error: stdin is closed, there is nothing to read: give the text on it, or as an option\n"
FULL = "error: No space left on device\n"


def shell(cache: Path, *arguments: object, streams: str) -> Result:
    command = f"{shlex.join([*COMMAND, *map(str, arguments)])} {streams}"
    done = subprocess.run(["bash", "-c", command], env=environment(cache), capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    return done


@pytest.mark.parametrize("command", COMMANDS)
def test_a_text_of_help_that_cannot_be_written(cache_home: Path, command: str) -> None:
    closed = shell(cache_home, command, "--help", streams=">&-")
    assert (closed.returncode, closed.stderr) == (2, NOWHERE)
    full = shell(cache_home, command, "--help", streams=">/dev/full")
    assert (full.returncode, full.stderr) == (1, FULL)


@pytest.mark.parametrize("command", ["inspect", "verify", "plan", "run --prompt a -n 2", ""])
def test_results_that_cannot_be_written(cache_home: Path, pack: Path, command: str) -> None:
    name, *options = command.split() or ["--version"]
    arguments = (name, pack, *options) if command else (name,)
    for streams, status, said in ((">&-", 2, NOWHERE), (">/dev/full", 1, FULL), ("<&- >&- 2>&-", 2, "")):
        done = shell(cache_home, *arguments, streams=streams)
        assert (done.returncode, done.stderr, done.stdout) == (status, said, ""), streams
    assert shell(cache_home, *arguments, streams="1</dev/null").returncode == 1


def test_remarks_that_cannot_be_written(cache_home: Path, pack: Path) -> None:
    """Results are results, whoever hears of them."""
    run = ("run", pack, "--prompt", "a", "-n", 2)
    whole = shell(cache_home, *run, streams="")
    assert whole.stderr
    closed = shell(cache_home, *run, streams="2>&-")
    assert (closed.returncode, closed.stdout) == (0, whole.stdout)
    assert shell(cache_home, *run, streams="2>/dev/full").returncode != 0
    assert shell(cache_home, "run", pack, "--budget-gb", 0, streams="2>&-").returncode == 2
    assert shell(cache_home, "run", pack / "none", "-p", "a", streams="2>/dev/full").returncode == 2


def test_a_closed_stdin(cache_home: Path, pack: Path) -> None:
    for command in (("run", pack), ("run", pack, "--prompt-file", "-"), ("chat", pack)):
        done = shell(cache_home, *command, streams="<&-")
        assert (done.returncode, done.stderr, done.stdout) == (2, NOTHING, "")
    assert shell(cache_home, "run", pack, "-p", "a", "-n", 2, streams="<&-").returncode == 0


def test_no_file_takes_the_number_of_a_closed_stream(cache_home: Path, checkpoint: Path, tmp_path: Path) -> None:
    """What is printed would be written into it."""
    done = shell(cache_home, "run", checkpoint, "-p", "a", "-n", 2, "--cache-dir", tmp_path, streams="<&- 2>&-")
    assert done.returncode == 0
    (made,) = (path for path in (tmp_path / "packs").iterdir() if path.is_dir())
    Pack(made).verify()
    assert all(path.stat().st_size == 0 for path in (tmp_path / "packs").glob("*.lock"))


@pytest.mark.parametrize("module", ["typer", "numpy", "tokenizers"])
def test_ctrl_c_during_imports(
    launch: Launch, pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    slow, reached = tmp_path / "slow", tmp_path / "reached"
    slow.mkdir()
    (slow / f"{module}.py").write_text(f"import time; open({str(reached)!r}, 'w'); time.sleep(60)\n")
    monkeypatch.syspath_prepend(slow)
    process = launch("run", pack, "-p", "a", "-n", 2, text=True)
    while not reached.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "error: interrupted\n")


def test_an_interrupt_before_a_command_runs_is_reported():
    program = """
import sys, typer
import flashrt.cli.app as app

def build(arguments):
    commands = typer.Typer()

    @commands.command()
    def run():
        raise KeyboardInterrupt

    return commands

app.build, sys.argv = build, ["flashrt"]
from flashrt.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 130
    assert done.stderr == "error: interrupted\n"
