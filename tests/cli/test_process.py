"""The process: signals, pipes, and what it imports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Launch, environment


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_ctrl_c_prints_figures(launch: Launch, long_pack: Path, options: list[str]) -> None:
    process = launch("run", long_pack, "-p", "hello", "-n", 60000, "--ignore-eos", *options)
    assert process.stdout is not None
    begun = process.stdout.read(5) if not options else b""
    if options:
        _wait_until_computing(process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    if options:
        report = json.loads(out)
        assert report["finish_reason"] == "interrupted"
    else:
        assert len(begun) == 5
        assert b"interrupted]" in err
        assert b"tokens/s" in err
    assert b"Traceback" not in err
    assert b"error" not in err


def test_ctrl_c_stops_an_answer_but_not_the_chat(launch: Launch, long_pack: Path) -> None:
    options = ("--temperature", 0, "--context", 20000, "--stats")
    process = launch("chat", long_pack, *options, stdin=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"hello\n")
    process.stdin.flush()
    process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(b"/reset\n/exit\n", timeout=60)
    assert process.returncode == 0, err
    assert b"interrupted]" in err
    assert b"[started over]" in err


def _wait_until_computing(process: subprocess.Popen[bytes]) -> None:
    """Until the process has used some seconds of CPU time: it prints nothing that could be waited for."""
    ticks = os.sysconf("SC_CLK_TCK")
    while process.poll() is None:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        if (int(fields[11]) + int(fields[12])) / ticks > 5:
            return


def test_a_reader_that_leaves_is_no_error(launch: Launch, long_pack: Path) -> None:
    process = launch("run", long_pack, "-p", "hello", "-n", 60000, "--ignore-eos")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 141


@pytest.mark.parametrize("options", [[], ["--raw"]])
def test_run_imports_only_what_it_needs(pack: Path, tmp_path: Path, options: list[str]) -> None:
    program = (
        "import sys\n"
        f"sys.argv = ['flashrt', 'run', {str(pack)!r}, '-p', 'hello', '-n', '2', *{options!r}]\n"
        "import flashrt.cli\n"
        "try:\n"
        "    flashrt.cli.main()\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "unwanted = {'torch', 'transformers', 'gguf', 'safetensors', 'huggingface_hub', 'jinja2', 'triton',\n"
        "            'rich', 'flashrt.cli.doctor', 'flashrt.cli.bench', 'flashrt.storage.sources'}\n"
        "found = sorted(unwanted & set(sys.modules))\n"
        "assert not found, found\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment(tmp_path), check=False
    )
    assert result.returncode == 0, result.stderr


def test_importing_flashrt_is_cheap(tmp_path: Path) -> None:
    program = "import sys, flashrt; assert flashrt.__version__; assert 'numpy' not in sys.modules, 'numpy'"
    subprocess.run([sys.executable, "-c", program], env=environment(tmp_path), check=True)
