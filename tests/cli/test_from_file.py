"""`flashrt run model.gguf` reads weights from the file itself."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Cli
from tests.kept import CASES
from tests.quantized import FORMATS, quantized_checkpoint

RUN = ("-p", "hello there", "-n", 6, "--ignore-eos")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return CASES["plain"].write(tmp_path / "model.gguf")


def shelf(cli: Cli, cache: Path) -> list[dict[str, Any]]:
    return list(json.loads(cli("models", "--cache-dir", cache, "--json").stdout)["packs"])


@pytest.mark.parametrize("case", CASES)
def test_text_is_that_of_a_pack_and_nothing_is_packed(cli: Cli, case: str, tmp_path: Path) -> None:
    file, cache = CASES[case].write(tmp_path / "model.gguf"), tmp_path / "cache"
    before = file.read_bytes()
    assert cli("pack", file, tmp_path / "pack").returncode == 0
    expected = cli("run", tmp_path / "pack", *RUN)
    for _ in range(2):
        found = cli("run", file, *RUN, "--cache-dir", cache)
        assert (found.returncode, found.stdout) == (0, expected.stdout), found.stderr
        assert f"note: weights are read from {file} itself, nothing is packed" in found.stderr
    (outline,) = shelf(cli, cache)
    assert outline["name"].startswith("model-rows-")
    assert outline["problem"] is None
    assert file.read_bytes() == before


def test_a_model_that_is_packed_uses_its_pack(cli: Cli, file: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert "not calibrated" in cli("run", file, *RUN, "--mode", "sparse", "--cache-dir", cache).stderr  # but packed
    found = cli("run", file, *RUN, "--cache-dir", cache)
    assert found.returncode == 0
    assert "nothing is packed" not in found.stderr
    assert [pack["name"].split("-")[1] for pack in shelf(cli, cache)] == ["auto"]


def test_what_is_inspected_is_not_packed(cli: Cli, file: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    facts = json.loads(cli("inspect", file, "--cache-dir", cache, "--json").stdout)
    assert facts["files"][str(file)] == file.stat().st_size
    assert facts["bytes"] == sum(facts["files"].values())
    assert [pack["name"].split("-")[1] for pack in shelf(cli, cache)] == ["rows"]


def test_a_plan_packs_nothing(cli: Cli, file: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    found = cli("plan", file, "--cache-dir", cache)
    assert found.returncode == 0, found.stderr
    assert f"none, weights are read from {file}" in " ".join(found.stdout.split())
    assert [pack["name"].split("-")[1] for pack in shelf(cli, cache)] == ["rows"]


def test_touched_and_moved_files_stay_the_same_model(cli: Cli, file: Path, tmp_path: Path) -> None:
    """And a session goes on with them; with another file's weights it does not."""
    cache, session = tmp_path / "cache", tmp_path / "session"
    run = ("-p", "hello there " * 15, *RUN[2:], "--cache-dir", cache, "--session", session)
    first = cli("run", file, *run)
    assert first.returncode == 0, first.stderr
    os.utime(file)
    moved = shutil.move(file, tmp_path / "elsewhere.gguf")
    again = cli("run", moved, *run)
    assert again.returncode == 0, again.stderr
    assert "resumed" in again.stderr
    assert len(shelf(cli, cache)) == 1
    CASES["biases"].write(Path(moved))
    other = cli("run", moved, *run)
    assert other.returncode != 0
    assert "Traceback" not in other.stderr


def test_a_truncated_file_is_refused(cli: Cli, file: Path, tmp_path: Path) -> None:
    os.truncate(file, file.stat().st_size * 3 // 4)
    found = cli("run", file, *RUN, "--cache-dir", tmp_path / "cache")
    assert (found.returncode, found.stdout) == (1, "")
    assert "model.gguf" in found.stderr
    assert "Traceback" not in found.stderr
    assert shelf(cli, tmp_path / "cache") == []


def test_an_outline_is_no_pack_to_verify(cli: Cli, file: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert cli("run", file, *RUN, "--cache-dir", cache).returncode == 0
    (outline,) = shelf(cli, cache)
    found = cli("verify", outline["path"])
    assert found.returncode == 2
    assert f"is an outline of {file}, which has no checksums" in found.stderr


def test_remove_takes_the_outline_and_leaves_the_file(cli: Cli, file: Path, tmp_path: Path) -> None:
    cache, before = tmp_path / "cache", file.read_bytes()
    assert cli("run", file, *RUN, "--cache-dir", cache).returncode == 0
    (outline,) = shelf(cli, cache)
    assert cli("remove", outline["name"], "--cache-dir", cache).returncode == 0
    assert shelf(cli, cache) == []
    assert file.read_bytes() == before


def test_a_damaged_outline_is_named(cli: Cli, file: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert cli("run", file, *RUN, "--cache-dir", cache).returncode == 0
    (outline,) = shelf(cli, cache)
    manifest = Path(outline["path"]) / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"places"', b'"pieces"'))
    found = cli("run", file, *RUN, "--cache-dir", cache)
    assert found.returncode == 1
    assert "manifest.json is damaged" in found.stderr


def test_what_keeps_nothing_is_packed(cli: Cli, tmp_path: Path) -> None:
    own = FORMATS["gptq"]
    path, _ = quantized_checkpoint(own, tmp_path, **own.extra)
    found = cli("run", path, *RUN, "--cache-dir", tmp_path / "cache")
    assert found.returncode == 0, found.stderr
    assert [pack["name"].split("-")[-3] for pack in shelf(cli, tmp_path / "cache")] == ["auto"]
