"""Packs in the cache: listed, and removed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashrt.checkpoints.cache import PACKS, lock_file
from flashrt.checkpoints.pack_job import cached_pack
from flashrt.checkpoints.shelf import named, remove, shelved_packs
from flashrt.errors import UsageError
from flashrt.storage.lock import lock
from flashrt.storage.manifest import MANIFEST_FILE
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


def test_what_is_left_of_a_removal_is_removed(cache: Path) -> None:
    pack = shelved_packs(cache)[0]
    (pack.path / MANIFEST_FILE).unlink()
    left = named(shelved_packs(cache), pack.name)
    assert left.manifest is None
    remove(left)
    assert pack.name not in names(cache)
