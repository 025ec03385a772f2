"""Checkpoints are known by what their files hold, not by where they lie or when they were touched."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from flashrt.checkpoints import content
from flashrt.checkpoints.content import content_of, remembered_content
from flashrt.checkpoints.pack_job import cached_pack
from flashrt.errors import CheckpointError
from tests.families import tiny_checkpoint, tiny_gguf


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_checkpoint("llama", tmp_path / "model")[1]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def packs(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "packs").iterdir() if path.is_dir())


def pack(where: Path, cache: Path) -> Path:
    return cached_pack(str(where), "int8", cache, lambda *_: None)


def touch(where: Path) -> Path:
    for path in where.rglob("*"):
        os.utime(path, (1e9, 1e9))
    return where


def copy(where: Path) -> Path:
    return shutil.copytree(where, where.with_name("copy"))


def rename(where: Path) -> Path:
    return where.rename(where.with_name("other"))


def link(where: Path) -> Path:
    where.with_name("link").symlink_to(where)
    return where.with_name("link")


def rewrite(where: Path) -> Path:
    """As a container's layers or rsync do: the same bytes in new files."""
    for path in [path for path in where.iterdir() if path.is_file()]:
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data)
    return where


def add_notes(where: Path) -> Path:
    (where / "README.md").write_text("notes")
    return where


@pytest.mark.parametrize("change", [touch, copy, rename, link, rewrite, add_notes])
def test_the_same_bytes_are_packed_once(change: Callable[[Path], Path], checkpoint: Path, cache: Path) -> None:
    first = pack(checkpoint, cache)
    changed = change(checkpoint)
    assert pack(changed, cache) == first
    assert packs(cache) == [first.name]
    assert remembered_content(changed, cache) is not None


def flip_weight(where: Path) -> None:
    """One byte in the middle, with size and times as they were."""
    path = where / "model.safetensors"
    status, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def change_template(where: Path) -> None:
    config = json.loads((where / "tokenizer_config.json").read_text())
    (where / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "x"}))


def add_file(where: Path) -> None:
    (where / "generation_config.json").write_text(json.dumps({"temperature": 0.5, "eos_token_id": 7}))


@pytest.mark.parametrize("change", [flip_weight, change_template, add_file])
def test_other_bytes_are_another_checkpoint(change: Callable[[Path], None], checkpoint: Path, cache: Path) -> None:
    first = pack(checkpoint, cache)
    change(checkpoint)
    assert remembered_content(checkpoint, cache) is None
    assert pack(checkpoint, cache) != first
    assert len(packs(cache)) == 2


def test_nothing_is_read_again_while_nothing_changes(
    checkpoint: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = content_of(checkpoint, cache)
    monkeypatch.setattr(content, "_read", None)
    assert content_of(checkpoint, cache) == remembered_content(checkpoint, cache) == found
    monkeypatch.chdir(checkpoint.parent)
    assert content_of(Path(checkpoint.name), cache) == found
    (note,) = (cache / "known").iterdir()
    for damaged in (b"", b"{", b"[]", b'{"form": 1}'):
        note.write_bytes(damaged)
        assert remembered_content(checkpoint, cache) is None


def test_gguf_files_are_known_whatever_they_are_called(tmp_path: Path, cache: Path) -> None:
    _, path = tiny_gguf("llama", tmp_path / "a.gguf")
    first = pack(path, cache)
    renamed = path.rename(tmp_path / "b.gguf")
    assert pack(renamed, cache) == first
    (tmp_path / "folder").mkdir()
    shutil.copy(renamed, tmp_path / "folder" / "c.gguf")
    assert pack(tmp_path / "folder", cache) == first


def test_an_unfinished_pack_is_finished_after_a_touch(checkpoint: Path, cache: Path) -> None:
    done = pack(checkpoint, cache)
    expected = (done / "manifest.json").read_bytes()
    shutil.rmtree(done)
    seen = 0

    def stop(stage: str, count: int, total: int) -> None:
        nonlocal seen
        seen += stage == "packing"
        if seen == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_pack(str(checkpoint), "int8", cache, stop)
    assert not (done / "manifest.json").exists()
    assert pack(touch(checkpoint), cache) == done
    assert (done / "manifest.json").read_bytes() == expected


def test_files_that_cannot_be_read_are_named(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read .*none"):
        content_of(tmp_path / "none", cache)


def test_large_files_are_read_in_pieces(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(os.urandom(100_000))
    monkeypatch.setattr(content, "CHUNK_BYTES", 4096)
    seen: list[tuple[int, int]] = []
    whole = content_of(path, cache, lambda _, done, total: seen.append((done, total)))
    assert seen[-1] == (100_000, 100_000)
    assert len(seen) == 25
    data = bytearray(path.read_bytes())
    data[:4096], data[4096:8192] = data[4096:8192], data[:4096]
    path.write_bytes(data)
    assert content_of(path, cache) != whole
