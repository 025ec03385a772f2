"""A file is replaced whole, or stays as it was."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from flashrt.errors import DiskError
from flashrt.storage.atomic import replacing, write_atomically


def test_a_block_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with pytest.raises(KeyboardInterrupt):
        _fail_half_way(path)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"old")]
    write_atomically(path, b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"new")]


def _fail_half_way(path: Path) -> None:
    with replacing(path) as handle:
        handle.write(b"new")
        handle.flush()
        assert path.read_bytes() == b"old"
        raise KeyboardInterrupt


def test_it_is_synced_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def noted(name: str) -> Callable[..., None]:
        real = getattr(os, name)
        return lambda *args: (order.append(name), real(*args))[1]

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, noted(name))
    write_atomically(tmp_path / "file", b"data")
    assert order == ["fsync", "replace", "fsync"]  # the file, then its directory


def test_writers_that_meet_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replacing(path, ".1.tmp") as one, replacing(path, ".2.tmp") as two:
        one.write(b"one")
        two.write(b"other")
    assert path.read_bytes() == b"one"  # whole: the last to end


@pytest.mark.parametrize(("code", "reason"), [(errno.ENOSPC, "is full"), (errno.EIO, "Input/output error")])
def test_a_failing_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, reason: str) -> None:
    def fails(handle: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(DiskError, match=reason):
        write_atomically(tmp_path / "file", b"data")
    assert not list(tmp_path.iterdir())
