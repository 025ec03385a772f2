"""The outline of a GGUF file: a pack whose kept weights are not copied, but read from the file itself.

It holds what a pack holds beside those weights. `flashrt.storage.source_file` says which file they
lie in.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

from flashrt.errors import UnsupportedModelError
from flashrt.storage import _io
from flashrt.storage.atomic import disk_errors, write_atomically
from flashrt.storage.kept import Kept
from flashrt.storage.kept_rows import KeptEncoder
from flashrt.storage.layout import BLOCK_BYTES, PackLayout, pack_layout
from flashrt.storage.manifest import MANIFEST_FILE, FileEntry, Manifest
from flashrt.storage.packer import Encoder, encoded_block, file_header, source_errors, vector_bytes, write_text
from flashrt.storage.places import Places, file_layout, places_of
from flashrt.storage.sources import Checkpoint
from flashrt_kernels.rows import Codec

MOST_COPIED = 16 << 20  # bytes of weights that an outline holds itself, or
COPIED_SHARE = 16  # this part of all: more is worth a pack


def in_place(source: Checkpoint, kept: Kept, files: Sequence[Path]) -> Places | None:
    """Where `files` (absolute paths) have what an outline need not hold; None where it would hold too much itself."""
    layout = pack_layout(source.spec, Codec.INT8, kept=kept)
    places = places_of(source, layout, files)
    copied = sum(tensor.nbytes for name, tensor in layout.tensors.items() if name not in places.tensors)
    return places if copied <= max(MOST_COPIED, layout.nbytes // COPIED_SHARE) else None


def write_file_outline(
    source: Checkpoint, out: Path, kept: Kept, places: Places, block_bytes: int = BLOCK_BYTES
) -> Manifest:
    """Write into the directory `out`. Raises UnsupportedModelError, CheckpointError and DiskError, as a packer does."""
    if problem := source.spec.unsupported():
        raise UnsupportedModelError(f"{source.source} is not supported: {problem}")
    packed = pack_layout(source.spec, Codec.INT8, block_bytes, kept=kept)
    layout = file_layout(packed, places, block_bytes)
    encoder = KeptEncoder(source, kept)
    with source_errors(source):
        texts = {name: write_text(out, name, data) for name, data in source.text_files().items()}
        files = {file: _write_file(source, encoder, layout, out / file) for file in layout.file_bytes}
    identity = source.name, source.source, source.fingerprint
    manifest = Manifest(*identity, Codec.INT8, source.spec, files, texts, block_bytes, kept=kept, places=places)
    write_atomically(out / MANIFEST_FILE, manifest.to_bytes())
    return manifest


def _write_file(source: Checkpoint, encoder: Encoder, layout: PackLayout, path: Path) -> FileEntry:
    header, blocks, vectors_crc = file_header(layout, path.name), {}, 0
    with disk_errors(path.parent), path.open("wb") as handle:
        handle.write(header)
        for tensor in layout.tensors_of(path.name):
            handle.seek(tensor.offset)
            crcs = []
            for index in range(tensor.blocks):
                data = encoded_block(encoder, tensor, index)
                crcs.append(_io.crc32(data))
                handle.write(data.data)
            blocks[tensor.name] = tuple(crcs)
        for vector in layout.vectors_of(path.name):
            values = vector_bytes(source, vector)
            vectors_crc = zlib.crc32(values, vectors_crc)
            handle.seek(vector.offset)
            handle.write(values)
        handle.truncate(layout.file_bytes[path.name])
    return FileEntry(layout.file_bytes[path.name], "", zlib.crc32(header), blocks, vectors_crc)
