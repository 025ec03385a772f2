"""Packs in the cache: listed, and removed."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest

from flashrt.checkpoints.cache import PACKS, lock_file
from flashrt.checkpoints.pack_job import cached_pack
from flashrt.checkpoints.shelf import named, remove, shelved_packs
from flashrt.errors import UsageError
from flashrt.storage.lock import lock
from flashrt.storage.manifest import MANIFEST_FILE
from flashrt.storage.pack import is_pack
from flashrt.storage.packer import JOB_FILE
from tests.cli.conftest import Cli, check_failure
from tests.families import tiny_checkpoint


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache with packs of two models, one of them in two dtypes."""
    for family, dtype in (("llama", "int4"), ("llama", "bf16"), ("qwen2", "int8")):
        path = tiny_checkpoint(family, tmp_path / f"tiny-{family}")[1]
        cached_pack(str(path), dtype, tmp_path / "cache", lambda *_: None)
    return tmp_path / "cache"


def names(cache: Path) -> list[str]:
    return [path.name for path in sorted((cache / PACKS).iterdir()) if path.is_dir()]


def test_every_pack_is_listed(cli: Cli, cache: Path) -> None:
    (cache / PACKS / "begun").mkdir()
    (cache / PACKS / "begun" / JOB_FILE).write_text("{}")
    damaged = cache / PACKS / names(cache)[-1]
    (damaged / MANIFEST_FILE).write_text("{")
    listed = json.loads(cli("models", "--cache-dir", cache, "--json").stdout)["packs"]
    assert [pack["name"] for pack in listed] == names(cache)
    problems = {pack["name"]: pack["problem"] for pack in listed if pack["problem"]}
    assert problems.keys() == {"begun", damaged.name}
    assert problems["begun"].startswith("unfinished")
    assert "manifest.json is" in problems[damaged.name]
    for pack in listed:
        files = [file for file in Path(pack["path"]).iterdir() if file.name != JOB_FILE]
        assert pack["bytes"] >= sum(file.stat().st_size for file in files if file.suffix == ".safetensors")
    ready = next(pack for pack in listed if pack["dtype"] == "int4")
    assert ready["model"] == "tiny-llama"
    assert "tiny-llama" in ready["source"]
    text = cli("models", "--cache-dir", cache).stdout
    assert all(name in text.replace("\n", "") or name[:20] in text for name in names(cache))


def test_a_pack_is_removed_by_any_of_its_names(cli: Cli, cache: Path) -> None:
    before = names(cache)
    result = cli("remove", "tiny-qwen2", "--cache-dir", cache)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("removed tiny-qwen2-int8-")
    gone = json.loads(cli("remove", before[0], cache / PACKS / before[0], "--cache-dir", cache, "--json").stdout)
    assert gone["removed"] == [before[0]]
    assert names(cache) == before[1:2]
    assert [path.name for path in (cache / PACKS).iterdir() if path.is_file()] == [f"{before[1]}.lock"]


def test_what_cannot_be_meant_is_named(cli: Cli, cache: Path) -> None:
    before = names(cache)
    options = ("--cache-dir", cache)
    check_failure(cli("remove", "tiny-llama", *options), 2, "may mean 2 packs: name one of tiny-llama-bf16-")
    check_failure(cli("remove", before[0], "nothing", *options), 2, "holds no pack nothing; it holds tiny-llama-bf16-")
    check_failure(cli("remove", "../..", *options), 2, "holds no pack")
    assert names(cache) == before


def test_an_empty_cache(cli: Cli, tmp_path: Path) -> None:
    assert "holds no packs" in cli("models", "--cache-dir", tmp_path / "none").stdout
    check_failure(cli("remove", "demo", "--cache-dir", tmp_path), 2, "the cache holds no pack demo; it holds none")


def test_a_pack_that_is_being_made_stays(cache: Path) -> None:
    pack = shelved_packs(cache)[0]
    with lock(lock_file(pack.path)), pytest.raises(UsageError, match="is being packed by another process"):
        remove(pack)
    assert pack.name in names(cache)


@pytest.mark.parametrize("gone", [0, 1])
def test_a_removal_that_is_killed_stands_in_nobodys_way(
    cli: Cli, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: int
) -> None:
    """The model is packed again, and what is left is removed, by its name or with the next pack of the model."""
    pack = next(pack for pack in shelved_packs(cache) if pack.manifest and pack.manifest.name == "tiny-qwen2")

    def killed(path: Path) -> None:
        if gone:
            (path / MANIFEST_FILE).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove(pack)
    monkeypatch.undo()
    (left,) = (pack for pack in shelved_packs(cache) if pack.problem)
    assert (left.name, left.problem) == (f"{pack.name}.removed", "removed in part: remove it again")
    again = cached_pack(str(tmp_path / "tiny-qwen2"), "int8", cache, lambda *_: None)
    assert again == pack.path
    before = names(cache)
    remove(left if gone else pack)
    assert names(cache) == [name for name in before if name not in ({left.name} if gone else {left.name, pack.name})]


def test_a_link_is_removed_and_not_what_it_names(cache: Path, tmp_path: Path) -> None:
    (cache / PACKS / names(cache)[0]).rename(tmp_path / "elsewhere")
    (cache / PACKS / "link").symlink_to(tmp_path / "elsewhere")
    remove(named(shelved_packs(cache), "link"))
    assert "link" not in names(cache)
    assert is_pack(tmp_path / "elsewhere")


def test_files_that_go_meanwhile_count_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, is_file = names(cache), Path.is_file

    def gone(path: Path) -> bool:
        found = is_file(path)
        if path.suffix == ".safetensors":
            path.unlink()
        return found

    monkeypatch.setattr(Path, "is_file", gone)
    assert [pack.name for pack in shelved_packs(cache)] == expected


def test_a_lock_that_was_deleted_is_none(tmp_path: Path) -> None:
    """Who waited for it takes the file that lies there now."""
    held, taken = lock(tmp_path / "lock"), []
    thread = threading.Thread(target=lambda: taken.append(lock(tmp_path / "lock")))
    thread.start()
    (tmp_path / "lock").unlink()
    held.close()
    thread.join()
    with pytest.raises(UsageError, match="busy"):
        lock(tmp_path / "lock", busy="busy")
    taken[0].close()
