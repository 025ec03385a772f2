"""A pack on disk: opened, checked cheaply, verified wholly."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable
from pathlib import Path

from flashrt.errors import PackError, UsageError
from flashrt.rope import RopeScaling
from flashrt.spec import ModelSpec
from flashrt.storage.layout import AHEAD_DIR, PackLayout
from flashrt.storage.manifest import MANIFEST_FILE, MAX_MANIFEST_BYTES, FileEntry, Manifest
from flashrt.storage.places import Places
from flashrt.storage.source_file import SourceFile, read_sources

HASH_BYTES = 4 << 20
TEXT_CHUNK_BYTES = 256 << 10  # small: this happens while the process is being measured


class Pack:
    """An opened pack: its manifest and layout. Opening checks everything but the data itself.

    `spec` is the manifest's, with `scaling` in place of its own rope scaling where one is given, and with routers that
    name as many as `experts` where that is given. Raises PackError when the directory, the manifest, a file or a header
    is missing, damaged or of the wrong size, and UsageError when the model cannot be changed so.
    """

    def __init__(self, path: Path | str, scaling: RopeScaling | None = None, experts: int | None = None) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        stored = self.manifest.spec
        scaled = stored if scaling is None else stored.scaled(scaling)
        self.spec: ModelSpec = scaled if experts is None else scaled.naming(experts)
        self.layout: PackLayout = self.manifest.layout
        for name, entry in self.manifest.files.items():
            _check_file(self.path / name, entry, self._header_bytes(name))
        for name in self.manifest.text_files:
            if not (self.path / name).is_file():
                raise PackError(f"{self.path / name} is missing: pack the checkpoint again")
        places = self.manifest.places
        self.sources: list[SourceFile] = []  # the files that weights are read from, of an outline
        if places is not None:
            self.sources = read_sources(self.path)
            _check_sources(self.path, places, self.sources)

    @property
    def fewer_experts(self) -> int | None:
        """Experts that routers name for a token, where that is fewer than the model was trained with; else None."""
        named = self.spec.experts_per_token
        return None if named == self.manifest.spec.experts_per_token else named

    @property
    def largest_file(self) -> Path:
        """The file to measure a disk with."""
        if self.sources:
            return Path(max(self.sources, key=lambda source: source.nbytes).path)
        files = self.layout.file_bytes
        return self.path / max(files, key=lambda name: files[name])

    def _header_bytes(self, file: str) -> int:
        offsets = [t.offset for t in self.layout.tensors_of(file)]
        offsets += [v.offset for v in self.layout.vectors_of(file)]
        return min(offsets, default=self.layout.file_bytes[file])

    def block_crc(self, tensor: str, index: int) -> int:
        """CRC-32 that block `index` of `tensor` has on disk."""
        return self.manifest.files[self.layout.tensors[tensor].file].blocks[tensor][index]

    def check_text(self, name: str) -> None:
        """Compare a text file of the pack (tokenizer.json, text.json) with the manifest. Raises PackError."""
        path, digest = self.path / name, hashlib.sha256()
        try:
            with open(path, "rb") as handle:
                while chunk := handle.read(TEXT_CHUNK_BYTES):
                    digest.update(chunk)
        except OSError as error:
            raise PackError(f"{path} cannot be read: {error.strerror}") from None
        if digest.hexdigest() != self.manifest.text_files[name]:
            raise PackError(f"{path} is damaged: its checksum does not match. Pack the checkpoint again")

    def verify(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Read every byte and compare it with the checksums. Raises PackError naming the first damaged file,
        and UsageError for an outline.
        """
        if self.sources:
            raise UsageError(
                f"{self.path} is an outline of {self.sources[0].path}, which has no checksums to compare with: "
                "`flashrt pack` makes a pack that has"
            )
        done, total = 0, self.layout.nbytes
        for name, entry in self.manifest.files.items():
            digest = hashlib.sha256()
            try:
                with open(self.path / name, "rb") as handle:
                    while chunk := handle.read(HASH_BYTES):
                        digest.update(chunk)
                        done += len(chunk)
                        progress(done, total)
            except OSError as error:
                raise PackError(f"{self.path / name} cannot be read: {error.strerror}") from None
            if digest.hexdigest() != entry.sha256:
                raise PackError(f"{self.path / name} is damaged: its SHA-256 does not match. Pack the checkpoint again")
        for name in self.manifest.text_files:
            self.check_text(name)
        if is_pack(self.path / AHEAD_DIR):
            Pack(self.path / AHEAD_DIR).verify()


def is_pack(path: Path) -> bool:
    """Whether `path` is a directory that holds a finished pack."""
    return (path / MANIFEST_FILE).is_file()


def read_manifest(path: Path) -> Manifest:
    """The manifest of a pack. Raises PackError where there is none, or it is damaged."""
    if not path.exists():
        raise PackError(f"{path} does not exist")
    if not path.is_dir():
        raise PackError(f"{path} is a file; a pack is a directory made by `flashrt pack`")
    manifest = path / MANIFEST_FILE
    try:
        size = manifest.stat().st_size
        if size > MAX_MANIFEST_BYTES:
            raise PackError(f"{manifest} has {size} bytes: no manifest is that large")
        return Manifest.from_bytes(manifest.read_bytes(), str(manifest))
    except FileNotFoundError:
        raise PackError(
            f"{path} is not a finished pack: it has no {MANIFEST_FILE}. If packing was interrupted, run it again"
        ) from None
    except OSError as error:
        raise PackError(f"{manifest} cannot be read: {error.strerror}") from None


def _check_sources(path: Path, places: Places, sources: list[SourceFile]) -> None:
    """Raises PackError where weights would lie beyond their files."""
    ends = [0] * places.files
    for rows in (rows for own in places.tensors.values() for rows in own):
        ends[rows.file] = max(ends[rows.file], rows.end)
    if len(sources) != places.files or any(end > file.nbytes for end, file in zip(ends, sources, strict=True)):
        raise PackError(f"{path} does not fit the files that it is of: remove it, and name the GGUF file itself")


def _check_file(path: Path, entry: FileEntry, header_bytes: int) -> None:
    try:
        size = path.stat().st_size
        if size != entry.nbytes:
            raise PackError(
                f"{path} has {size} bytes, expected {entry.nbytes}: the file is damaged. Pack the checkpoint again"
            )
        with open(path, "rb") as handle:
            header = handle.read(header_bytes)
    except FileNotFoundError:
        raise PackError(f"{path} is missing: pack the checkpoint again") from None
    except OSError as error:
        raise PackError(f"{path} cannot be read: {error.strerror}") from None
    if zlib.crc32(header) != entry.header_crc32:
        raise PackError(f"{path} is damaged: the checksum of its header does not match. Pack the checkpoint again")
