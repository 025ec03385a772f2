"""A lock file is held by one process, for as long as it lives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flashrt.errors import UsageError
from flashrt.storage.lock import lock


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with lock(path):
        for _ in range(2):
            with pytest.raises(UsageError, match="somebody is busy"):
                lock(path, busy="somebody is busy")
    lock(path, busy="somebody is busy").close()


def test_waiting_for_a_child_that_inherited_it(tmp_path: Path) -> None:
    """A packer whose parent was killed is still waited for."""
    path = tmp_path / "lock"
    program = f"import time; time.sleep(0.3); open({str(tmp_path / 'done')!r}, 'w')"
    with lock(path) as held, subprocess.Popen([sys.executable, "-c", program], pass_fds=[held.fileno()]):
        held.close()
        with lock(path):
            assert (tmp_path / "done").exists()


def test_content_is_kept(tmp_path: Path) -> None:
    with lock(tmp_path / "job") as held:
        held.write("kept")
    with lock(tmp_path / "job") as held:
        held.seek(0)
        assert held.read() == "kept"
    with pytest.raises(FileNotFoundError):
        lock(tmp_path / "none" / "job")
