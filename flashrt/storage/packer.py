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
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np

from flashrt.errors import CheckpointError, DiskError, UnsupportedModelError, UsageError
from flashrt.sparsity import Sparsity
from flashrt.spec import ModelSpec
from flashrt.storage import _io
from flashrt.storage.atomic import disk_errors, replacing, write_atomically
from flashrt.storage.kept import Kept
from flashrt.storage.layout import AHEAD_DIR, BLOCK_BYTES, PackLayout, TensorLayout, VectorLayout, pack_layout
from flashrt.storage.lock import lock
from flashrt.storage.manifest import MANIFEST_FILE, FileEntry, Manifest
from flashrt.storage.room import check_room
from flashrt.storage.safetensors_file import build_header
from flashrt.storage.sink import Sink
from flashrt_kernels import ops
from flashrt_kernels.rows import MATRIX_ROWS, Codec, row_bytes

if TYPE_CHECKING:  # `flashrt run` reads the name of a job from here, and no checkpoint
    from flashrt.storage.moving import Move

CHUNK_WEIGHTS = 4 << 20  # float32 weights converted at a time and per row of a bundle: 16 MiB
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
    def neuron_rows(self, key: str, run: int, start: int, stop: int) -> tuple[Array | None, Array, Array]: ...


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
    move: Move | None = None,
    kept: Kept | None = None,
    ahead: Callable[[Path], object] | None = None,
) -> Manifest:
    """Convert `source` into a pack at `out`, or finish one that was interrupted.

    `encoder` is where encoded bundles come from; without one it is the weights of `source`, then a WeightSource.
    `sparsity` makes it a calibrated pack; `kept` says which tensors have the codecs of a file. With `move`, files of
    the source are deleted as they are packed. `ahead` is called first, with the directory that the pack has for the
    layer that predicts further tokens.

    Raises UnsupportedModelError for shapes that the kernels do not take, UsageError when `out` holds something else,
    DiskError when the disk is too small or fails, CheckpointError when the source cannot be read or holds values that
    are not finite.
    """
    if problem := source.spec.unsupported():
        raise UnsupportedModelError(f"{source.source} is not supported: {problem}")
    layout = pack_layout(source.spec, dtype, block_bytes, sparsity, kept)
    job = _job_of(source, dtype, block_bytes, sparsity, kept)
    with _job(out, job, layout, move):
        manifest_path = out / MANIFEST_FILE
        if manifest_path.exists():  # killed while tidying up
            manifest = Manifest.from_bytes(manifest_path.read_bytes(), str(manifest_path))
        else:
            if ahead is not None:
                ahead(out / AHEAD_DIR)
            rows = encoder or RowEncoder(cast(WeightSource, source))
            files, texts = _write_all(source, rows, out, layout, progress, move)
            identity = source.name, source.source, source.fingerprint
            manifest = Manifest(*identity, dtype, source.spec, files, texts, block_bytes, sparsity, kept)
            write_atomically(manifest_path, manifest.to_bytes())
        if move is not None:
            move.finish()
        for file in layout.file_bytes:
            _entry_path(out, file).unlink(missing_ok=True)
    if move is not None:
        move.over()
    return manifest


def _write_all(
    source: Contents,
    encoder: Encoder,
    out: Path,
    layout: PackLayout,
    progress: Progress,
    move: Move | None,
) -> tuple[dict[str, FileEntry], dict[str, str]]:
    """Write every file that an earlier run has not completed; the entries of data files, the hashes of text files.

    The text files come first: they take seconds, and what is wrong with them is better known before an hour of work.
    """
    with source_errors(source):
        texts = source.text_files()
    text_files = {name: write_text(out, name, data) for name, data in texts.items()}
    files = _finished_files(out, layout)
    done = 0
    for file in layout.file_bytes:
        if file not in files:
            files[file] = _FileWriter(source, encoder, out, file, layout, progress, done).write()
        if move is not None:
            move.release(files)
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
def _job(out: Path, job: dict[str, object], layout: PackLayout, move: Move | None) -> Iterator[None]:
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
            _check_room(out, layout, move)
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
    names = [path.name for path in out.iterdir()]
    return any(name == AHEAD_DIR or name.endswith((".safetensors", ENTRY_SUFFIX)) for name in names)


def _check_room(out: Path, layout: PackLayout, move: Move | None) -> None:
    present = _finished_files(out, layout)
    needed = layout.nbytes - sum(entry.nbytes for entry in present.values())
    if move is not None:
        needed = move.most(layout.file_bytes, present)
    needed += 64 << 20  # tokenizer, manifest, and the file system's own
    check_room(out, needed, "the pack", "choose another directory or a smaller --dtype")


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


def file_header(layout: PackLayout, file: str) -> bytes:
    """The safetensors header of one file of a pack."""
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        tensor.name: ("U8", (tensor.bundles, tensor.stride)) for tensor in layout.tensors_of(file)
    }
    shapes |= {vector.name: ("F32", (vector.length,)) for vector in layout.vectors_of(file)}
    return build_header(shapes)


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

    def write(self) -> FileEntry:
        with disk_errors(self.out), replacing(self.out / self.file) as handle:
            with Sink(handle) as sink, source_errors(self.source):
                header_crc, blocks, vectors_crc = self._contents(sink)
            entry = FileEntry(sink.written, sink.sha256, header_crc, blocks, vectors_crc)
        write_atomically(_entry_path(self.out, self.file), json.dumps(entry.to_json()).encode())
        return entry

    def _contents(self, sink: Sink) -> tuple[int, dict[str, tuple[int, ...]], int]:
        """Put everything; the checksums of the header, of each tensor's blocks, and of the vectors."""
        header = file_header(self.layout, self.file)
        self._put(sink, header)
        blocks = {tensor.name: tuple(self._tensor(sink, tensor)) for tensor in self.layout.tensors_of(self.file)}
        vectors_crc = 0
        for layout in self.layout.vectors_of(self.file):
            data = vector_bytes(self.source, layout)
            vectors_crc = zlib.crc32(data, vectors_crc)
            self._put(sink, data)
        return zlib.crc32(header), blocks, vectors_crc

    def _put(self, sink: Sink, data: bytes | memoryview) -> None:
        with disk_errors(self.out):
            sink.put(data)
        self.progress(self.file, self.done + sink.written, self.layout.nbytes)

    def _tensor(self, sink: Sink, tensor: TensorLayout) -> Iterator[int]:
        """Put the blocks of a tensor and yield the CRC-32 of each."""
        for index in range(tensor.blocks):
            data = encoded_block(self.encoder, tensor, index)
            yield _io.crc32(data)
            self._put(sink, data.data)


def vector_bytes(source: Contents, layout: VectorLayout) -> bytes:
    """A vector as a pack has it. Raises CheckpointError for one of another length, or that is not finite."""
    vector = np.ascontiguousarray(source.vector(layout.name), dtype="<f4")
    if vector.shape != (layout.length,):
        raise CheckpointError(f"{layout.name} has shape {vector.shape}, expected ({layout.length},)")
    _check_finite(layout.name, vector)
    return vector.tobytes()


def encoded_block(encoder: Encoder, tensor: TensorLayout, index: int) -> Array:
    """A block of a tensor as a pack has it, uint8, in memory of its own: the last one may be on its way to disk."""
    block = tensor.block(index)
    data = np.zeros(block.nbytes, np.uint8)
    bundles = data.reshape(block.bundles, tensor.stride)
    run, first = divmod(block.first, tensor.run_stride)
    filled = min(block.bundles, tensor.run_bundles - first)
    if filled > 0:
        encoder.fill(tensor, run, first, bundles[:filled])
    return data


class RowEncoder:
    """Encodes the weights of a source."""

    def __init__(self, source: WeightSource) -> None:
        self.source = source
        self.kernels = ops.load("cpu")
        self.kernels.set_threads(len(os.sched_getaffinity(0)))

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
        size = row_bytes(tensor.codec, tensor.columns)
        encoded = np.empty((stop - start, size), np.uint8)
        self._encode(tensor, rows, encoded)
        for r in range(MATRIX_ROWS):
            share = encoded[r::MATRIX_ROWS]
            bundles[: len(share), r * size : (r + 1) * size] = share

    def _fill_neurons(self, tensor: TensorLayout, run: int, first: int, bundles: Array) -> None:
        gate, up, down = self.source.neuron_rows(tensor.name, run, first, first + len(bundles))
        rows = [up, down] if gate is None else [gate, up, down]
        if len(rows) != tensor.bundle_rows:
            raise CheckpointError(f"{tensor.name} has {len(rows)} rows per neuron, expected {tensor.bundle_rows}")
        size = row_bytes(tensor.codec, tensor.columns)
        for r, weights in enumerate(rows):
            self._encode(tensor, weights, bundles[:, r * size : (r + 1) * size])

    def _encode(self, tensor: TensorLayout, weights: Array, out: Array) -> None:
        """Encode rows of a tensor into `out`, uint8 [rows, row_bytes]."""
        self.encode_into(tensor.codec, tensor.name, weights, tensor.columns, out)

    def encode(self, codec: Codec, name: str, weights: Array, rows: int, columns: int) -> Array:
        """Weights [rows, columns] as rows of a codec, uint8. Raises CheckpointError where they are not that."""
        encoded = np.empty((rows, row_bytes(codec, columns)), np.uint8)
        self.encode_into(codec, name, weights, columns, encoded)
        return encoded

    def encode_into(self, codec: Codec, name: str, weights: Array, columns: int, out: Array) -> None:
        """The same into `out`, uint8 [rows, row_bytes]."""
        if weights.shape != (len(out), columns):
            raise CheckpointError(f"{name}: read shape {weights.shape}, expected {(len(out), columns)}")
        weights = np.ascontiguousarray(weights, dtype=np.float32)
        _check_finite(name, weights)
        self.kernels.quantize(weights, codec, out)


def _all_finite(values: Array) -> bool:
    if values.ndim == 1:  # vectors are small, and synthetic packs need no compiled kernels
        return bool(np.isfinite(values).all())
    from flashrt_kernels.cpu import stored

    return stored.finite(values.reshape(-1, values.shape[-1]))


def _check_finite(name: str, values: Array) -> None:
    if not _all_finite(values):
        raise CheckpointError(f"{name} holds values that are not finite (NaN or infinity): the checkpoint is damaged")


def write_text(out: Path, name: str, data: bytes) -> str:
    write_atomically(out / name, data)
    return hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def source_errors(source: Contents) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"reading {source.source} failed: {error.strerror}") from None
