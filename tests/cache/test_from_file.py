"""Weights read from a GGUF file itself: the bytes of a pack in memory, whatever becomes of the file."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from flashrt.cache import from_file
from flashrt.checkpoints.pack_job import cached_outline
from flashrt.errors import CheckpointError, DiskError, PackError
from flashrt.storage import reader as reading
from flashrt.storage.layout import BLOCK_BYTES
from flashrt.storage.pack import Pack
from flashrt.storage.safetensors_file import PAGE
from flashrt.storage.source_file import SOURCE_FILE
from tests.engine.support import logits_of, tiny_engine
from tests.kept import CASES, LATENT_CASES, keep

PROMPT, TOKENS = [5, 9, 70, 33, 12, 8], [4, 100, 41, 7]


@pytest.fixture(scope="module", params=CASES | LATENT_CASES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Pack, Pack]:
    """(outline of a file, pack of it)."""
    root = tmp_path_factory.mktemp(request.param)
    return outlined(request.param, root), keep(root / "model.gguf", root / "pack", BLOCK_BYTES)


def outlined(case: str, root: Path) -> Pack:
    path = (CASES | LATENT_CASES)[case].write(root / "model.gguf")
    return Pack(cached_outline(str(path), root / "cache", lambda *_: None))


@pytest.fixture(params=[from_file.BUFFER_BYTES, 3 * PAGE], ids=["one read", "many reads"])
def buffers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(from_file, "BUFFER_BYTES", request.param)


@pytest.mark.parametrize("tells", [True, False], ids=["cached", "direct"])
def test_memory_holds_what_a_pack_holds(
    both: tuple[Pack, Pack], buffers: None, tells: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    outline, packed = both
    assert outline.manifest.places is not None
    assert len(outline.manifest.places.tensors) > len(outline.layout.tensors) / 2
    assert outline.layout == packed.layout
    opened = from_file.open_cached
    monkeypatch.setattr(from_file, "open_cached", lambda path: (opened(path)[0], tells))
    with tiny_engine(outline, 1.0) as engine, tiny_engine(packed, 1.0) as expected:
        for name in packed.layout.tensors:
            memory = engine.runner.decoder.weights.memory(name), expected.runner.decoder.weights.memory(name)
            assert np.array_equal(*memory), name
        assert np.array_equal(logits_of(engine, PROMPT, TOKENS), logits_of(expected, PROMPT, TOKENS))


def test_an_outline_takes_hardly_any_room(both: tuple[Pack, Pack]) -> None:
    outline, packed = both
    assert outline.manifest.places is not None
    held = sum(t.nbytes for t in packed.layout.tensors.values() if t.name not in outline.manifest.places.tensors)
    taken = sum(file.stat().st_blocks * 512 for file in outline.path.glob("*.safetensors"))
    assert taken <= held + sum(4 * v.length for v in packed.layout.vectors.values()) + 4 * PAGE * len(
        packed.manifest.files
    )


@pytest.fixture
def outline(tmp_path: Path) -> Pack:
    return outlined("k", tmp_path)


def model(outline: Pack) -> Path:
    return outline.path.parents[2] / "model.gguf"


def test_what_is_not_all_in_memory_is_refused(outline: Pack) -> None:
    with pytest.raises(PackError, match=r"is an outline, from which nothing streams: name .*model\.gguf"):
        tiny_engine(outline, 0.1)


def test_a_block_of_the_file_cannot_be_read_from_the_outline(outline: Pack) -> None:
    reader = reading.Reader(outline)
    block = outline.layout.tensors["0.ffn"].block(0)
    with pytest.raises(PackError, match=r"is an outline, from which 0\.ffn cannot be read"):
        reader.submit(block, np.zeros(block.nbytes, np.uint8))
    reader.close()


@pytest.mark.parametrize("how", ["touched", "cut", "replaced", "missing"])
def test_a_file_that_changed_is_named(outline: Pack, how: str) -> None:
    path = model(outline)
    if how == "touched":
        os.utime(path)
    elif how == "cut":
        os.truncate(path, path.stat().st_size - 1)
    elif how == "replaced":
        shutil.copy2(path, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)
    else:
        path.unlink()
    with pytest.raises(PackError, match=r"model\.gguf " + ("is missing" if how == "missing" else "has changed")):
        tiny_engine(outline, 1.0)


def test_a_file_that_changes_while_it_is_read_is_named(outline: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    path, put = model(outline), from_file._scattered

    def changing(*arguments: object) -> from_file.Put:
        with path.open("r+b") as handle:
            handle.seek(path.stat().st_size - 1)
            handle.write(b"x")
        return put(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(from_file, "_scattered", changing)
    with pytest.raises(PackError, match=r"model\.gguf has changed"):
        tiny_engine(outline, 1.0)


def test_a_read_that_fails_is_named(outline: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = from_file.SourceFile.open

    def unreadable(source: from_file.SourceFile) -> tuple[int, bool]:
        handle, direct = opened(source)
        os.dup2(os.open(source.path, os.O_WRONLY), handle)
        return handle, direct

    monkeypatch.setattr(from_file.SourceFile, "open", unreadable)
    monkeypatch.setattr(from_file, "open_cached", lambda path: (os.open(path, os.O_RDONLY), False))
    with pytest.raises(DiskError, match=r"reading .*model\.gguf at byte \d+ failed: Bad file descriptor"):
        tiny_engine(outline, 1.0)


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    path = CASES["k"].write(tmp_path / "model.gguf")
    outline = Pack(cached_outline(str(path), tmp_path / "cache", lambda *_: None))
    assert outline.manifest.places is not None
    rows = outline.manifest.places.tensors["1.ffn"][0]
    raw = bytearray(path.read_bytes())
    raw[rows.offset : rows.offset + 2] = b"\x00\x7c"  # the first scale of a block of Q4_K
    path.write_bytes(raw)
    outline = Pack(cached_outline(str(path), tmp_path / "cache", lambda *_: None))
    with pytest.raises(CheckpointError, match=r"1\.ffn holds values that are not finite"):
        tiny_engine(outline, 1.0)


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ("[]", "does not fit the files"),
        ('[["/x", 1, 1, 1, 1, 1]]', "does not fit the files"),
        ('[["/x", "1", 1, 1, 1, 1]]', "is damaged"),
        ("[[3]]", "is damaged"),
        ("{", "is damaged"),
    ],
)
def test_a_record_of_the_files_that_makes_no_sense_is_refused(outline: Pack, record: str, says: str) -> None:
    (outline.path / SOURCE_FILE).write_text(record)
    with pytest.raises(PackError, match=says):
        Pack(outline.path)
