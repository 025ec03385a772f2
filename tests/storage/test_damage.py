"""Damaged packs: opening or verifying names the file, and never answers with anything but PackError."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashrt.errors import PackError
from flashrt.storage.pack import Pack
from flashrt.storage.packer import pack
from flashrt_kernels.rows import Codec
from tests.fake_source import DENSE, FakeSource

DATA_FILES = ("resident.safetensors", "layer-000.safetensors", "layer-001.safetensors")
TEXT_FILES = ("tokenizer.json", "text.json")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("damage") / "p"
    pack(FakeSource(DENSE, tokenizer=b'{"model": null}'), path, Codec.INT8)
    return path


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "copy")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [Path.unlink, _cut, _lengthen, _empty, _replace_by_directory])
@pytest.mark.parametrize("file", DATA_FILES)
def test_opening_names_the_file(copy: Path, file: str, damage: Callable[[Path], None]) -> None:
    damage(copy / file)
    with pytest.raises(PackError, match=file):
        Pack(copy)


@pytest.mark.parametrize("at", [0, 7, 8, 9, 100, 4095])
@pytest.mark.parametrize("file", DATA_FILES)
def test_a_flipped_bit_in_a_header_is_seen_when_opening(copy: Path, file: str, at: int) -> None:
    _flip(copy / file, at)
    with pytest.raises(PackError, match=rf"{file}.*header"):
        Pack(copy)


@pytest.mark.parametrize("at", [4096, -1, 0.5])
@pytest.mark.parametrize("file", DATA_FILES)
def test_a_flipped_bit_in_the_data_is_seen_when_verifying(copy: Path, file: str, at: float) -> None:
    size = (copy / file).stat().st_size
    _flip(copy / file, int(size * at) if isinstance(at, float) else at % size)
    opened = Pack(copy)
    with pytest.raises(PackError, match=rf"{file}.*SHA-256"):
        opened.verify()


@pytest.mark.parametrize("file", TEXT_FILES)
def test_text_files(copy: Path, file: str) -> None:
    _flip(copy / file, 0)
    opened = Pack(copy)
    with pytest.raises(PackError, match=file):
        opened.check_text(file)
    with pytest.raises(PackError, match=file):
        opened.verify()
    (copy / file).unlink()
    with pytest.raises(PackError, match=file):
        opened.check_text(file)
    with pytest.raises(PackError, match=file):
        Pack(copy)


@pytest.mark.parametrize("file", DATA_FILES)
def test_a_file_that_vanishes_while_open(copy: Path, file: str) -> None:
    opened = Pack(copy)
    (copy / file).unlink()
    with pytest.raises(PackError, match=file):
        opened.verify()


def test_not_a_pack(tmp_path: Path) -> None:
    with pytest.raises(PackError, match="does not exist"):
        Pack(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(PackError, match="is a file"):
        Pack(tmp_path / "file")
    with pytest.raises(PackError, match="not a finished pack"):
        Pack(tmp_path)
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(PackError, match=r"manifest\.json"):
        Pack(tmp_path)


def test_a_huge_manifest_is_not_read(copy: Path) -> None:
    with open(copy / "manifest.json", "ab") as handle:
        handle.truncate(1 << 40)
    with pytest.raises(PackError, match="no manifest is that large"):
        Pack(copy)


@given(st.sampled_from(DATA_FILES), st.data())
@settings(max_examples=100, deadline=None)
def test_header_fuzz(whole: Path, tmp_path_factory: pytest.TempPathFactory, file: str, data: st.DataObject) -> None:
    """Any other header is refused, wherever it differs."""
    path = tmp_path_factory.mktemp("fuzz") / "p"
    path.mkdir()
    for source in whole.iterdir():
        (path / source.name).symlink_to(source)
    (path / file).unlink()
    raw = bytearray((whole / file).read_bytes())
    start = data.draw(st.integers(0, 4095))
    splice = data.draw(st.binary(min_size=1, max_size=4096 - start))
    changed = bytes(raw[:start]) + splice + bytes(raw[start + len(splice) :])
    (path / file).write_bytes(changed)
    if changed == bytes(raw):
        Pack(path)
    else:
        with pytest.raises(PackError, match=file):
            Pack(path)


def _flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 0x10
    path.write_bytes(bytes(raw))
