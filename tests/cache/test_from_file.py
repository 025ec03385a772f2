"""Weights read from a GGUF file itself: the bytes of a pack in memory, whatever becomes of the file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from flashrt.cache import from_file
from flashrt.cache.experts import ExpertCache, ExpertStream
from flashrt.checkpoints.pack_job import cached_outline
from flashrt.errors import CheckpointError, DiskError, PackError
from flashrt.model.ffn.experts import MixtureKind
from flashrt.storage.file_outline import in_place, write_file_outline
from flashrt.storage.kept import kept_of
from flashrt.storage.pack import Pack
from flashrt.storage.safetensors_file import PAGE
from flashrt.storage.source_file import SOURCE_FILE, SourceFile, write_sources
from flashrt.storage.sources import open_checkpoint
from flashrt_kernels.rows import row_bytes
from tests.engine.support import logits_of, tiny_engine
from tests.kept import BLOCK_BYTES, CASES, LATENT_CASES, keep

PROMPT, TOKENS = [5, 9, 70, 33, 12, 8] * 4, [4, 100, 41, 7]


@pytest.fixture(scope="module", params=CASES | LATENT_CASES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Pack, Pack]:
    """(outline of a file, pack of it), in small blocks."""
    root = tmp_path_factory.mktemp(request.param)
    path = (CASES | LATENT_CASES)[request.param].write(root / "model.gguf")
    return outline_of(path, root / "outline"), keep(path, root / "pack")


def outline_of(path: Path, out: Path) -> Pack:
    """What `cached_outline` makes, in small blocks."""
    out.mkdir()
    with open_checkpoint(path) as source:
        source.validate()
        kept = kept_of(source)
        assert kept is not None
        places = in_place(source, kept, [path])
        assert places is not None
        write_file_outline(source, out, kept, places, BLOCK_BYTES)
    write_sources(out, [SourceFile.of(path)])
    return Pack(out)


def outlined(case: str, root: Path) -> Pack:
    path = (CASES | LATENT_CASES)[case].write(root / "model.gguf")
    return Pack(cached_outline(str(path), root / "cache", lambda *_: None))


@pytest.fixture(scope="module")
def expected(both: tuple[Pack, Pack]) -> np.ndarray:
    with tiny_engine(both[1], 1.0) as engine:
        return logits_of(engine, PROMPT, TOKENS)


@pytest.fixture(params=[from_file.BUFFER_BYTES, 3 * PAGE], ids=["one read", "many reads"])
def buffers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(from_file, "BUFFER_BYTES", request.param)


@pytest.mark.parametrize("tells", [True, False], ids=["cached", "direct"])
def test_results_have_the_bits_of_the_pack(
    both: tuple[Pack, Pack], expected: np.ndarray, buffers: None, tells: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    outline, packed = both
    assert outline.manifest.places is not None
    assert len(outline.manifest.places.tensors) > len(packed.layout.tensors) / 2
    assert outline.manifest.packed == packed.layout
    opened = from_file.open_cached
    monkeypatch.setattr(from_file, "open_cached", lambda path: (opened(path)[0], tells))
    with tiny_engine(outline, 1.0) as engine:
        assert engine.plan.pins_all(outline.layout)
        assert np.array_equal(logits_of(engine, PROMPT, TOKENS), expected)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6])
def test_what_streams_from_the_file_has_them_too(both: tuple[Pack, Pack], expected: np.ndarray, share: float) -> None:
    with tiny_engine(both[0], share) as engine:
        assert not engine.plan.resident
        for _ in range(2):  # the first time, rows are looked at
            assert np.array_equal(logits_of(engine, PROMPT, TOKENS), expected)
        names = [name for name in both[0].layout.tensors if name.endswith(":down")]
        assert share or not any(engine.plan.pinned[name] for name in names)


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
    path, pieces = model(outline), from_file._pieces

    def changing(*arguments: object) -> Iterator[object]:
        write_to(path)
        return pieces(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(from_file, "_pieces", changing)
    with pytest.raises(PackError, match=r"model\.gguf has changed"):
        tiny_engine(outline, 1.0)


def write_to(path: Path) -> None:
    with path.open("r+b") as handle:
        handle.seek(path.stat().st_size - 1)
        handle.write(b"x")


@pytest.mark.parametrize("case", ["plain", "experts"])
@pytest.mark.parametrize("share", [0.0, 0.6])
def test_a_file_that_changes_while_it_streams_is_named(case: str, share: float, tmp_path: Path) -> None:
    outline = outline_of(CASES[case].write(tmp_path / "model.gguf"), tmp_path / "outline")
    with tiny_engine(outline, share) as engine:
        logits_of(engine, PROMPT, TOKENS[:1])
        write_to(tmp_path / "model.gguf")
        with pytest.raises(PackError, match=r"model\.gguf has changed"):
            logits_of(engine, PROMPT, TOKENS)


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_rows_of_embeddings_that_are_not_finite_are_named(share: float, tmp_path: Path) -> None:
    """The row is one that the prompt has, and no block before it is wrong."""
    path = CASES["k"].write(tmp_path / "model.gguf")
    outline = outline_of(path, tmp_path / "outline")
    embed = outline.layout.tensors["embed"]
    raw = bytearray(path.read_bytes())
    at = embed.offset + PROMPT[2] * row_bytes(embed.codec, embed.columns)
    raw[at : at + 2] = b"\x00\x7c"
    path.write_bytes(raw)
    write_sources(outline.path, [SourceFile.of(path)])
    with (
        pytest.raises(CheckpointError, match="embed holds values that are not finite"),
        tiny_engine(Pack(outline.path), share) as engine,
    ):
        logits_of(engine, PROMPT, TOKENS)


@pytest.mark.parametrize(("share", "store"), [(0.05, ExpertStream), (0.3, ExpertCache), (0.6, ExpertCache)])
def test_experts_in_slots_have_the_bits_of_the_pack(share: float, store: type, tmp_path: Path) -> None:
    path = CASES["experts"].write(tmp_path / "model.gguf")
    outline, packed = outline_of(path, tmp_path / "outline"), keep(path, tmp_path / "pack")
    with tiny_engine(packed, 1.0) as engine:
        expected = logits_of(engine, PROMPT, TOKENS)
    with tiny_engine(outline, share) as engine:
        (kind,) = [kind for kind in engine.runner.decoder.ffns.kinds if isinstance(kind, MixtureKind)]
        assert isinstance(kind.store, store)
        for _ in range(3):
            assert np.array_equal(logits_of(engine, PROMPT, TOKENS), expected)


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
    with pytest.raises(CheckpointError, match=r"1\.ffn:gate holds values that are not finite"):
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
