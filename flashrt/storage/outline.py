"""The outline of a pack: its manifest, its text, and files of the right sizes that hold headers, and no data.

It opens and is planned with like the pack that it stands for, and takes no room on the disk. Nothing runs from it.
"""

from __future__ import annotations

import zlib
from pathlib import Path

from flashrt.errors import UnsupportedModelError
from flashrt.storage.atomic import disk_errors, write_atomically
from flashrt.storage.kept import Kept
from flashrt.storage.layout import PackLayout, pack_layout
from flashrt.storage.manifest import MANIFEST_FILE, FileEntry, Manifest
from flashrt.storage.packer import Contents, file_header, write_text
from flashrt_kernels.rows import Codec


def write_outline(source: Contents, out: Path, dtype: Codec, kept: Kept | None) -> Manifest:
    """Write into the directory `out`. Raises UnsupportedModelError for shapes that no pack has, and DiskError."""
    if problem := source.spec.unsupported():
        raise UnsupportedModelError(f"{source.source} is not supported: {problem}")
    layout = pack_layout(source.spec, dtype, kept=kept)
    texts = {name: write_text(out, name, data) for name, data in source.text_files().items()}
    files = {file: _write_file(layout, file, out / file) for file in layout.file_bytes}
    identity = source.name, source.source, source.fingerprint
    manifest = Manifest(*identity, dtype, source.spec, files, texts, kept=kept)
    write_atomically(out / MANIFEST_FILE, manifest.to_bytes())
    return manifest


def _write_file(layout: PackLayout, file: str, path: Path) -> FileEntry:
    header, nbytes = file_header(layout, file), layout.file_bytes[file]
    with disk_errors(path.parent), path.open("wb") as handle:
        handle.write(header)
        handle.truncate(nbytes)  # a hole, which reads as zeros
    blocks = {tensor.name: (0,) * tensor.blocks for tensor in layout.tensors_of(file)}
    return FileEntry(nbytes, "", zlib.crc32(header), blocks, 0)
