"""GGUF files that were split, lie in directories or in hub repositories: found by their first part, their only name,
or the tag behind a colon.
"""

from __future__ import annotations

import shutil
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import errors as hub_errors

from flashrt.errors import CheckpointError, DiskError
from flashrt.storage.gguf_files import models_among, only_gguf, part_names, part_of, pick
from flashrt.storage.names import is_repository, repository_of
from flashrt.storage.sources import open_checkpoint
from flashrt.storage.sources.hub import fetch_repository
from tests.families import tiny_checkpoint, tiny_gguf

NAMES = (
    "M-Q4_K_M.gguf",
    "M-Q8_0.gguf",
    "M-UD-Q4_K_XL.gguf",
    "BF16/M-BF16-00001-of-00002.gguf",
    "BF16/M-BF16-00002-of-00002.gguf",
    "mmproj-M-F16.gguf",
    "imatrix_unsloth.gguf",
    "README.md",
)


def split(path: Path, parts: int, directory: Path, **metadata: Any) -> list[Path]:
    """Write the parts of a GGUF file as llama.cpp splits it: the first has the metadata."""
    reader = gguf.GGUFReader(path)
    tensors = reader.tensors
    names = [directory / f"m-{i:05d}-of-{parts:05d}.gguf" for i in range(1, parts + 1)]
    for i, name in enumerate(names):
        writer = gguf.GGUFWriter(name, "llama")
        if i == 0:
            for field in reader.fields.values():
                if not field.name.startswith(("GGUF.", "general.architecture")):
                    kinds = field.types
                    sub = kinds[-1] if kinds[0] == gguf.GGUFValueType.ARRAY else None
                    writer.add_key_value(field.name, field.contents(), kinds[0], sub_type=sub)
        numbers = {"split.no": i, "split.count": parts, "split.tensors.count": len(tensors)} | metadata
        for key, value in numbers.items():
            writer.add_uint32(key, value)
        for tensor in tensors[i::parts]:
            writer.add_tensor(tensor.name, tensor.data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return names


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf("llama", tmp_path_factory.mktemp("gguf") / "whole.gguf")[1]


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_parts_are_read_as_the_whole(whole: Path, parts: int, tmp_path: Path) -> None:
    first, *others = split(whole, parts, tmp_path)
    with open_checkpoint(whole) as one, open_checkpoint(first) as several:
        several.validate()
        assert several.spec == one.spec
        assert several.name == "m"
        assert several.text_files() == one.text_files()
        for key in ("embed", "head", "2.qkv", "1.out"):
            np.testing.assert_array_equal(several.matrix_rows(key, 0, 60), one.matrix_rows(key, 0, 60))
        for mine, theirs in zip(*(c.neuron_rows("1.ffn", 0, 3, 40) for c in (several, one)), strict=True):
            np.testing.assert_array_equal(mine, theirs)
    with pytest.raises(CheckpointError, match=r"part 2 of .*give the first, m-00001-of"):
        open_checkpoint(others[0])
    others[-1].unlink()
    with pytest.raises(CheckpointError, match=rf"of which {others[-1].name} is missing"):
        open_checkpoint(first)


def test_parts_that_do_not_belong_together(whole: Path, tmp_path: Path) -> None:
    first, second, third = split(whole, 3, tmp_path)
    second.write_bytes(third.read_bytes())
    with pytest.raises(CheckpointError, match=r"m-00002-of-00003.gguf is not part 2 of 3"):
        open_checkpoint(first)
    first, *_ = split(whole, 2, tmp_path, **{"split.tensors.count": 5})
    with pytest.raises(CheckpointError, match="expected 5"):
        open_checkpoint(first)
    renamed = first.rename(tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError, match=r"its name does not say which: expected NAME-00001-of-00002"):
        open_checkpoint(renamed)


def test_a_count_of_parts_that_is_a_lie(tmp_path: Path) -> None:
    path = tmp_path / "x-00001-of-99999.gguf"
    key = b"split.count"
    entry = struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 10, 1 << 62)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entry + bytes(64))
    with pytest.raises(CheckpointError, match="one of 4611686018427387904 parts"):
        open_checkpoint(path)


def test_names() -> None:
    assert part_of("M-00002-of-00003.gguf") == ("M", 2, 3)
    assert part_of("M-Q8_0.gguf") is None
    assert part_names("a/M-00002-of-00002.gguf") == ["a/M-00001-of-00002.gguf", "a/M-00002-of-00002.gguf"]
    assert models_among(NAMES) == ["BF16/M-BF16-00001-of-00002.gguf", *NAMES[:3]]
    assert repository_of("org/name:Q4_K_M") == ("org/name", "Q4_K_M")
    assert repository_of("org/name") == ("org/name", None)
    assert is_repository("org/M-GGUF:UD-Q4_K_XL")
    assert not is_repository("org/name:")
    assert not is_repository("org/name:a/b")


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("Q4_K_M", "M-Q4_K_M.gguf"),
        ("q8_0", "M-Q8_0.gguf"),
        ("Q4_K_XL", "M-UD-Q4_K_XL.gguf"),
        ("UD-Q4_K_XL", "M-UD-Q4_K_XL.gguf"),
        ("BF16", "BF16/M-BF16-00001-of-00002.gguf"),
        ("M-Q8_0.gguf", "M-Q8_0.gguf"),
    ],
)
def test_tags(tag: str, expected: str) -> None:
    assert pick(NAMES, tag, "org/name") == expected


def test_several_files_are_asked_about() -> None:
    with pytest.raises(CheckpointError, match=r"holds 4 GGUF files.*name one of them, of .*M-Q8_0.gguf"):
        pick(NAMES, None, "org/name")
    with pytest.raises(CheckpointError, match=r"no GGUF file of 'Q2_K'; it holds .*M-Q4_K_M.gguf"):
        pick(NAMES, "Q2_K", "org/name")
    with pytest.raises(CheckpointError, match="holds no GGUF file"):
        pick(["README.md"], "Q2_K", "org/name")


def test_directories(whole: Path, tmp_path: Path) -> None:
    split(whole, 2, tmp_path)
    (tmp_path / "mmproj-m.gguf").write_bytes(b"GGUF")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with open_checkpoint(tmp_path) as checkpoint:
        checkpoint.validate()
    (tmp_path / "other-Q8_0.gguf").write_bytes(whole.read_bytes())
    with pytest.raises(CheckpointError, match=r"2 GGUF files.*m-00001-of-00002.gguf, other-Q8_0.gguf"):
        open_checkpoint(tmp_path)
    _, directory = tiny_checkpoint("llama", tmp_path / "hf")
    (directory / "model-Q8_0.gguf").write_bytes(whole.read_bytes())
    assert only_gguf(directory) is None  # safetensors come first
    with open_checkpoint(directory) as checkpoint:
        assert "Hugging Face" in checkpoint.source


class Hub:
    """A hub with one repository, whose files are those of a directory; downloads are links into another."""

    def __init__(self, files: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, online: bool = True):
        self.files, self.cache, self.online, self.fetched = files, cache, online, list[str]()
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot)
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda _, repository, **__: self.info(repository))

    def names(self, repository: str) -> list[str]:
        if not self.online:
            raise hub_errors.OfflineModeIsEnabled("offline")
        assert repository == "org/name"
        return [str(path.relative_to(self.files)) for path in self.files.rglob("*") if path.is_file()]

    def info(self, repository: str) -> Any:
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self.names(repository)])

    def snapshot(self, repository: str, allow_patterns: list[str], dry_run: bool = False, **_: Any) -> Any:
        if dry_run or self.online:
            wanted = [name for name in self.names(repository) if any(Path(name).match(p) for p in allow_patterns)]
            if dry_run:
                sizes = [(self.files / name).stat().st_size for name in wanted]
                return [SimpleNamespace(file_size=nbytes, will_download=True) for nbytes in sizes]
            for name in wanted:
                (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
                (self.cache / name).write_bytes((self.files / name).read_bytes())
            self.fetched += wanted
        return str(self.cache)


@pytest.mark.parametrize("begun", [False, True])
def test_room_is_asked_for_before_a_download(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    """What an interrupted download left is there already."""
    files, out = tmp_path / "files", tmp_path / "out"
    files.mkdir()
    (files / "x-Q8_0.gguf").write_bytes(whole.read_bytes())
    hub = Hub(files, tmp_path / "cache", monkeypatch)
    nbytes = whole.stat().st_size
    usage = shutil.disk_usage(tmp_path)._replace(free=nbytes - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    if begun:
        (out / ".cache").mkdir(parents=True)
        (out / ".cache" / "x.incomplete").write_bytes(b"12345")
        fetch_repository("org/name:Q8_0", out)
        assert hub.fetched
        return
    with pytest.raises(
        DiskError, match=r"the download of org/name needs 0\.00 GB more in .*out, the disk has 0\.00 GB"
    ):
        fetch_repository("org/name:Q8_0", out)
    assert not hub.fetched


def test_hub_repositories(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, cache = tmp_path / "files", tmp_path / "cache"
    (files / "BF16").mkdir(parents=True)
    split(whole, 2, files / "BF16")
    (files / "x-Q8_0.gguf").write_bytes(whole.read_bytes())
    (files / "config.json").write_text('{"model_type": "llama"}')
    hub = Hub(files, cache, monkeypatch)
    with pytest.raises(CheckpointError, match=r"org/name holds 2 GGUF files.*x-Q8_0.gguf"):
        open_checkpoint("org/name")
    with open_checkpoint("org/name:Q8_0") as checkpoint:
        assert (checkpoint.name, checkpoint.source) == ("x-Q8_0", "Hugging Face hub org/name:Q8_0")
    assert hub.fetched == ["x-Q8_0.gguf"]
    hub.online = False
    with open_checkpoint("org/name") as checkpoint:  # the only one that is here
        assert checkpoint.name == "x-Q8_0"
    hub.online = True
    with open_checkpoint("org/name:m") as checkpoint:
        checkpoint.validate()
    assert sorted(hub.fetched[1:]) == ["BF16/m-00001-of-00002.gguf", "BF16/m-00002-of-00002.gguf"]
    with pytest.raises(CheckpointError, match="no GGUF file of 'Q2_K'"):
        open_checkpoint("org/name:Q2_K")


def test_hub_repositories_of_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    hub = Hub(tmp_path, tmp_path / "cache", monkeypatch)
    with pytest.raises(CheckpointError, match=r"org/name holds no safetensors weights: pytorch_model.bin is a pickle"):
        open_checkpoint("org/name")
    assert hub.fetched == []
