"""Writes a pack: file by file, in bounded memory, resumable after a kill, complete only when the manifest is there.

Each data file is written under a temporary name, synced, renamed, and noted in a small entry file beside it; the
manifest is written last and replaces the entries. A killed packer therefore loses at most the file it was writing, and
a directory without a manifest is never mistaken for a pack.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Protocol, cast

import numpy as np

from flashrt.errors import CheckpointError, DiskError, UnsupportedModelError, UsageError
from flashrt.sparsity import Sparsity
from flashrt.spec import ModelSpec
from flashrt.storage.atomic import disk_errors, replacing, write_atomically
from flashrt.storage.kept import Kept
from flashrt.storage.layout import BLOCK_BYTES, PackLayout, TensorLayout, pack_layout
from flashrt.storage.lock import lock
from flashrt.storage.manifest import MANIFEST_FILE, FileEntry, Manifest
from flashrt.storage.safetensors_file import build_header
from flashrt_kernels import ops
from flashrt_kernels.rows import MATRIX_ROWS, Codec, row_bytes

CHUNK_WEIGHTS = 4 << 20  # float32 weights converted at a time and per row of a bundle: 16 MiB
FLUSH_BYTES = 64 << 20  # written pages are pushed to disk in steps of this, so that they never pile up in memory
JOB_FILE = "packing.json"
ENTRY_SUFFIX = ".entry.json"

Array = np.ndarray
Progress = Callable[[str, int, int], None]  # file, bytes done, bytes in all


class Contents(Protocol):
    """What the packer needs of where a pack comes from, beside an encoder of its tensors."""

    spec: ModelSpec
    name: str
    source: str
    fingerprint: str

    def vector(self, key: str) -> Array: ...
    def text_files(self) -> dict[str, bytes]: ...


class WeightSource(Contents, Protocol):
    """A checkpoint, whose weights are encoded; see `flashrt.storage.sources`."""

    def matrix_rows(self, key: str, start: int, stop: int) -> Array: ...
    def neuron_rows(self, layer: int, expert: int, start: int, stop: int) -> tuple[Array | None, Array, Array]: ...


class Encoder(Protocol):
    """Where the bytes of a pack come from."""

    def fill(self, tensor: TensorLayout, run: int, first: int, bundles: Array) -> None:
        """Write bundles [first, first + len(bundles)) of one run of a tensor into `bundles` (zeros, [n, stride])."""


def pack(
    source: Contents,
    out: Path,
    dtype: Codec,
    *,
    progress: Progress = lambda file, done, total: None,
    block_bytes: int = BLOCK_BYTES,
    encoder: Encoder | None = None,
    sparsity: Sparsity | None = None,
    kept: Kept | None = None,
) -> Manifest:
    """Convert `source` into a pack at `out`, or finish one that was interrupted.

    `encoder` is where encoded bundles come from; without one it is the weights of `source`, then a WeightSource.
    `sparsity` makes it a calibrated pack; `kept` says which tensors have the codecs of a file.

    Raises UnsupportedModelError for shapes that the kernels do not take, UsageError when `out` holds something else,
    DiskError when the disk is too small or fails, CheckpointError when the source cannot be read or holds values that
    are not finite.
    """
    if problem := source.spec.unsupported():
        raise UnsupportedModelError(f"{source.source} is not supported: {problem}")
    layout = pack_layout(source.spec, dtype, block_bytes, sparsity, kept)
    job = _job_of(source, dtype, block_bytes, sparsity, kept)
    with _job(out, job, layout):
        manifest_path = out / MANIFEST_FILE
        if manifest_path.exists():  # killed while tidying up
            manifest = Manifest.from_bytes(manifest_path.read_bytes(), str(manifest_path))
        else:
            files, texts = _write_all(source, encoder or RowEncoder(cast(WeightSource, source)), out, layout, progress)
            identity = source.name, source.source, source.fingerprint
            manifest = Manifest(*identity, dtype, source.spec, files, texts, block_bytes, sparsity, kept)
            write_atomically(manifest_path, manifest.to_bytes())
        for file in layout.file_bytes:
            _entry_path(out, file).unlink(missing_ok=True)
    return manifest


def _write_all(
    source: Contents,
    encoder: Encoder,
    out: Path,
    layout: PackLayout,
    progress: Progress,
) -> tuple[dict[str, FileEntry], dict[str, str]]:
    """Write every file that an earlier run has not completed; the entries of data files, the hashes of text files.

    The text files come first: they take seconds, and what is wrong with them is better known before an hour of work.
    """
    with _source_errors(source):
        texts = source.text_files()
    text_files = {name: _write_text(out, name, data) for name, data in texts.items()}
    files = _finished_files(out, layout)
    done = 0
    for file in layout.file_bytes:
        if file not in files:
            files[file] = _FileWriter(source, encoder, out, file, layout, progress, done).write()
        done += files[file].nbytes
        progress(file, done, layout.nbytes)
    return {file: files[file] for file in layout.file_bytes}, text_files


def _job_of(
    source: Contents, dtype: Codec, block_bytes: int, sparsity: Sparsity | None, kept: Kept | None
) -> dict[str, object]:
    """What tells one job from another."""
    job: dict[str, object] = {
        "source": source.fingerprint,
        "dtype": dtype.value,
        "block_bytes": block_bytes,
        "spec": hashlib.sha256(json.dumps(source.spec.to_json()).encode()).hexdigest(),
    }
    if sparsity is not None:
        job["sparsity"] = sparsity.to_json()
    if kept is not None:
        job["kept"] = kept.to_json()
    return job


@contextlib.contextmanager
def _job(out: Path, job: dict[str, object], layout: PackLayout) -> Iterator[None]:
    """Hold `out` for this job alone, and make sure that what it already holds belongs to the same job.

    A job that has written no weights yet binds nobody: `out` may be packed into with another dtype.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in out.iterdir()}
        if MANIFEST_FILE in names and JOB_FILE not in names:
            raise UsageError(f"{out} already holds a finished pack: remove it first, or choose another directory")
        if names and JOB_FILE not in names:
            raise UsageError(f"{out} is not empty and holds no unfinished pack: choose another directory")
        handle = lock(out / JOB_FILE, busy=f"another process is packing into {out}")
    except OSError as error:
        raise DiskError(f"cannot write to {out}: {error.strerror}") from None
    with handle:
        handle.seek(0)
        text = handle.read()
        same = _parsed(text) == job
        if not same and _holds_weights(out):
            raise UsageError(
                f"{out} holds an unfinished pack of another checkpoint or dtype: remove it, or choose another directory"
            )
        if not (out / MANIFEST_FILE).exists():
            _check_room(out, layout)
        if not same:
            with disk_errors(out):
                handle.truncate(0)
                handle.write(json.dumps(job))
                handle.flush()
                os.fsync(handle.fileno())
        yield
        (out / JOB_FILE).unlink()


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _holds_weights(out: Path) -> bool:
    """Whether an earlier run has completed a data file here."""
    return any(path.suffix == ".safetensors" or path.name.endswith(ENTRY_SUFFIX) for path in out.iterdir())


def _check_room(out: Path, layout: PackLayout) -> None:
    present = sum(entry.nbytes for entry in _finished_files(out, layout).values())
    needed = layout.nbytes - present + (64 << 20)  # tokenizer, manifest, and the file system's own
    free = shutil.disk_usage(out).free
    if free < needed:
        raise DiskError(
            f"the pack needs {needed / 1e9:.2f} GB more in {out}, the disk has {free / 1e9:.2f} GB free: "
            "free some space, choose another directory or a smaller --dtype"
        )


def _entry_path(out: Path, file: str) -> Path:
    return out / f"{file}{ENTRY_SUFFIX}"


def _finished_files(out: Path, layout: PackLayout) -> dict[str, FileEntry]:
    """The data files that earlier, interrupted runs completed."""
    return {file: entry for file in layout.file_bytes if (entry := _finished(out, file, layout))}


def _finished(out: Path, file: str, layout: PackLayout) -> FileEntry | None:
    """The entry of a file that an earlier, interrupted run completed."""
    try:
        entry = FileEntry.from_json(json.loads(_entry_path(out, file).read_bytes()))
        size = (out / file).stat().st_size
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None
    return entry if size == entry.nbytes == layout.file_bytes[file] else None


class _FileWriter:
    """Writes one data file and gathers its checksums on the way."""

    def __init__(
        self,
        source: Contents,
        encoder: Encoder,
        out: Path,
        file: str,
        layout: PackLayout,
        progress: Progress,
        done: int,
    ) -> None:
        self.source, self.encoder, self.out, self.file, self.layout = source, encoder, out, file, layout
        self.progress, self.done = progress, done
        self.sha = hashlib.sha256()
        self.written = 0
        self.flushed = 0

    def write(self) -> FileEntry:
        with disk_errors(self.out), replacing(self.out / self.file) as handle:
            with _source_errors(self.source):
                entry = self._contents(handle)
            _drop_pages(handle)
        write_atomically(_entry_path(self.out, self.file), json.dumps(entry.to_json()).encode())
        return entry

    def _contents(self, handle: IO[bytes]) -> FileEntry:
        tensors = list(self.layout.tensors_of(self.file))
        vectors = list(self.layout.vectors_of(self.file))
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {t.name: ("U8", (t.bundles, t.stride)) for t in tensors}
        shapes |= {v.name: ("F32", (v.length,)) for v in vectors}
        header = build_header(shapes)
        self._put(handle, header)
        blocks = {tensor.name: tuple(self._tensor(handle, tensor)) for tensor in tensors}
        vectors_crc = 0
        for layout in vectors:
            data = self._vector(layout.name, layout.length).tobytes()
            vectors_crc = zlib.crc32(data, vectors_crc)
            self._put(handle, data)
        return FileEntry(self.written, self.sha.hexdigest(), zlib.crc32(header), blocks, vectors_crc)

    def _put(self, handle: IO[bytes], data: bytes | memoryview) -> None:
        self.sha.update(data)
        self.written += len(data)
        with disk_errors(self.out):
            handle.write(data)
            if self.written - self.flushed >= FLUSH_BYTES:
                _drop_pages(handle)
                self.flushed = self.written
        self.progress(self.file, self.done + self.written, self.layout.nbytes)

    def _vector(self, name: str, length: int) -> Array:
        vector = np.ascontiguousarray(self.source.vector(name), dtype="<f4")
        if vector.shape != (length,):
            raise CheckpointError(f"{name} has shape {vector.shape}, expected ({length},)")
        _check_finite(name, vector)
        return vector

    def _tensor(self, handle: IO[bytes], tensor: TensorLayout) -> Iterator[int]:
        """Write the blocks of a tensor and yield the CRC-32 of each."""
        buffer = np.zeros(tensor.max_block_bytes, np.uint8)
        for index in range(tensor.blocks):
            block = tensor.block(index)
            data = buffer[: block.nbytes]
            data[:] = 0
            bundles = data.reshape(block.bundles, tensor.stride)
            run, first = divmod(block.first, tensor.run_stride)
            filled = min(block.bundles, tensor.run_bundles - first)
            if filled > 0:
                self.encoder.fill(tensor, run, first, bundles[:filled])
            view = data.data
            yield zlib.crc32(view)
            self._put(handle, view)


class RowEncoder:
    """Encodes the weights of a source."""

    def __init__(self, source: WeightSource) -> None:
        self.source = source
        self.kernels = ops.load("cpu")

    def fill(self, tensor: TensorLayout, run: int, first: int, bundles: Array) -> None:
        step = max(CHUNK_WEIGHTS // (tensor.columns * tensor.bundle_rows), 1)
        for start in range(0, len(bundles), step):
            part = bundles[start : start + step]
            if tensor.bundle_rows == MATRIX_ROWS:
                self._fill_matrix(tensor, first + start, part)
            else:
                self._fill_neurons(tensor, run, first + start, part)

    def _fill_matrix(self, tensor: TensorLayout, first: int, bundles: Array) -> None:
        start = first * MATRIX_ROWS
        stop = min(start + len(bundles) * MATRIX_ROWS, tensor.rows)
        rows = self.source.matrix_rows(tensor.matrix, tensor.row0 + start, tensor.row0 + stop)
        encoded = self.encode(tensor.codec, tensor.name, rows, stop - start, tensor.columns)
        size = row_bytes(tensor.codec, tensor.columns)
        for r in range(MATRIX_ROWS):
            share = encoded[r::MATRIX_ROWS]
            bundles[: len(share), r * size : (r + 1) * size] = share

    def _fill_neurons(self, tensor: TensorLayout, run: int, first: int, bundles: Array) -> None:
        layer = int(tensor.name.partition(".")[0])
        gate, up, down = self.source.neuron_rows(layer, run, first, first + len(bundles))
        rows = [up, down] if gate is None else [gate, up, down]
        if len(rows) != tensor.bundle_rows:
            raise CheckpointError(f"{tensor.name} has {len(rows)} rows per neuron, expected {tensor.bundle_rows}")
        size = row_bytes(tensor.codec, tensor.columns)
        for r, weights in enumerate(rows):
            encoded = self.encode(tensor.codec, tensor.name, weights, len(bundles), tensor.columns)
            bundles[:, r * size : (r + 1) * size] = encoded

    def encode(self, codec: Codec, name: str, weights: Array, rows: int, columns: int) -> Array:
        """Weights [rows, columns] as rows of a codec, uint8. Raises CheckpointError where they are not that."""
        if weights.shape != (rows, columns):
            raise CheckpointError(f"{name}: read shape {weights.shape}, expected {(rows, columns)}")
        weights = np.ascontiguousarray(weights, dtype=np.float32)
        _check_finite(name, weights)
        encoded = np.empty((rows, row_bytes(codec, columns)), np.uint8)
        self.kernels.quantize(weights, codec, encoded)
        return encoded


def _check_finite(name: str, values: Array) -> None:
    # The extremes are NaN or infinite as soon as one value is; unlike a mask they need no temporary.
    if values.size and not (np.isfinite(values.min()) and np.isfinite(values.max())):
        raise CheckpointError(f"{name} holds values that are not finite (NaN or infinity): the checkpoint is damaged")


def _drop_pages(handle: IO[bytes]) -> None:
    """Push what was written to disk and out of the page cache."""
    handle.flush()
    os.fdatasync(handle.fileno())
    os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _write_text(out: Path, name: str, data: bytes) -> str:
    write_atomically(out / name, data)
    return hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def _source_errors(source: Contents) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"reading {source.source} failed: {error.strerror}") from None
