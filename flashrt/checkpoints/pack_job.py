"""Fetching and packing a checkpoint; as a program, for `flashrt.checkpoints.resolve`, which runs it in a child process.

    python -m flashrt.checkpoints.pack_job CHECKPOINT DTYPE CACHE [CONTEXT]

DTYPE is one of DTYPE_NAMES, or OUTLINE for an outline of a GGUF file.

Says what `flashrt.checkpoints.job` does.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from flashrt.checkpoints.cache import OUTLINE, content_target, locked, named_target
from flashrt.checkpoints.content import content_of, weight_files
from flashrt.checkpoints.job import run
from flashrt.checkpoints.resolve import Progress
from flashrt.config import checked_context
from flashrt.errors import CheckpointError, UsageError
from flashrt.storage.atomic import disk_errors
from flashrt.storage.file_outline import in_place, write_file_outline
from flashrt.storage.gguf_files import SUFFIX
from flashrt.storage.kept import Kept, kept_of
from flashrt.storage.kept_rows import KeptEncoder
from flashrt.storage.layout import AHEAD_DIR
from flashrt.storage.manifest import Manifest
from flashrt.storage.moving import Move
from flashrt.storage.names import AUTO, CHECKPOINTS, DEMO_NAMES, is_remote
from flashrt.storage.pack import Pack, is_pack
from flashrt.storage.packer import JOB_FILE, pack
from flashrt.storage.places import Places
from flashrt.storage.source_file import SourceFile, write_sources
from flashrt.storage.sources import Checkpoint, open_checkpoint
from flashrt.storage.sources.demo import fetch_demo
from flashrt.storage.sources.hub import fetch_repository
from flashrt.storage.sources.moved import RECORD, reopen
from flashrt_kernels.rows import Codec


def fetch_checkpoint(name: str, cache: Path, out: Path | None, progress: Progress) -> Path:
    """Bring a demo model or a hub repository to this machine, into `out` or a cache; return where it is."""
    if name in DEMO_NAMES:
        return fetch_demo(name, out or cache / CHECKPOINTS, _fetching(progress))
    return fetch_repository(name, out)


def move_checkpoint(checkpoint: str | Path, out: Path, dtype: str, progress: Progress) -> Manifest:
    """Pack a directory or a file into the directory `out`, deleting its weights file by file as they are packed.

    Interrupted, it goes on when it is called again. Raises UsageError for what is not a place on this machine.
    """
    where = Path(checkpoint)
    if is_remote(str(checkpoint)):
        raise UsageError(f"--delete-source deletes a directory's or a file's weights, {checkpoint} is neither")
    source = reopen(out, where)
    if source is not None and is_pack(out) and not (out / JOB_FILE).exists():  # killed as the very last step came
        (out / RECORD).unlink()
        return Pack(out).manifest
    with source or open_checkpoint(where) as source:
        source.validate()
        return _write(source, out, dtype, progress, Move(source, where, out))


def pack_checkpoint(
    checkpoint: str | Path, out: Path, dtype: str, cache: Path, progress: Progress, context: int | None = None
) -> Manifest:
    """Pack a checkpoint, fetched first if it has to be, into the directory `out`; `dtype` is one of DTYPE_NAMES.

    Raises UsageError, before anything is packed, when the model does not support `context`.
    """
    with reopen(out, Path(checkpoint)) or open_checkpoint(
        checkpoint, cache / CHECKPOINTS, _fetching(progress)
    ) as source:
        _check(source, context)
        manifest = _write(source, out, dtype, progress)
    (out / RECORD).unlink(missing_ok=True)  # of files that were deleted before the job went on without deleting
    return manifest


def cached_pack(checkpoint: str, dtype: str, cache: Path, progress: Progress, context: int | None = None) -> Path:
    """The pack of a checkpoint in the cache, made unless it is there. One process makes it, others wait.

    Raises as `pack_checkpoint` does, and DiskError for a cache that cannot be written.
    """
    if is_remote(checkpoint):
        target = named_target(cache, checkpoint, dtype)
        with locked(target):
            if not is_pack(target):
                pack_checkpoint(checkpoint, target, dtype, cache, progress, context)
        return target
    with open_checkpoint(checkpoint, cache / CHECKPOINTS, _fetching(progress)) as source:
        _check(source, context)
        path = Path(checkpoint)
        source.fingerprint = content_of(path, cache, progress)  # an unfinished pack is finished wherever the files lie
        target = content_target(cache, path, dtype, source.fingerprint)
        with locked(target):
            if not is_pack(target):
                _write(source, target, dtype, progress)
    return target


def cached_outline(checkpoint: str, cache: Path, progress: Progress, context: int | None = None) -> Path:
    """The outline of a GGUF file in the cache, or the pack where one is there or nothing else will do; made as needed.

    Raises as `cached_pack` does.
    """
    path = Path(checkpoint)
    files = weight_files(path)
    sources = _sources(files)  # before they are read, headers too: what changes since is noticed
    with open_checkpoint(path) as source:
        _check(source, context)
        source.fingerprint = content_of(path, cache, progress)
        kept = kept_of(source) if all(file.suffix.lower() == SUFFIX for file in files) else None
        places = None if kept is None else in_place(source, kept, files)
        packed = is_pack(content_target(cache, path, AUTO, source.fingerprint))
        if not packed and kept is not None and places is not None:
            return _outlined(source, content_target(cache, path, OUTLINE, source.fingerprint), (kept, places), sources)
    return cached_pack(checkpoint, AUTO, cache, progress, context)


def _sources(files: list[Path]) -> list[SourceFile]:
    """Raises CheckpointError."""
    try:
        return list(map(SourceFile.of, files))
    except OSError as error:
        raise CheckpointError(f"cannot read {error.filename}: {error.strerror}") from error


def _outlined(source: Checkpoint, target: Path, stored: tuple[Kept, Places], sources: list[SourceFile]) -> Path:
    """The outline at `target`, made unless it is there, which then says where the source's files lie now."""
    unfinished = target.with_name(target.name + ".partial")
    with locked(target):
        if is_pack(target):
            for folder in filter(is_pack, (target, target / AHEAD_DIR)):
                write_sources(folder, sources)
            return target
        with disk_errors(target.parent):
            for left in (unfinished, target):
                if left.exists():
                    shutil.rmtree(left)
            unfinished.mkdir()
            write_file_outline(source, unfinished, *stored)
            write_sources(unfinished, sources)
            _outline_ahead(source, unfinished / AHEAD_DIR, sources)
            unfinished.rename(target)
    return target


def _outline_ahead(source: Checkpoint, out: Path, sources: list[SourceFile]) -> None:
    """Outline the layer that predicts further tokens, where there is one and the files hold it as a pack would."""
    kept = None if source.ahead is None else kept_of(source.ahead)
    if source.ahead is None or kept is None:
        return
    if (places := in_place(source.ahead, kept, [Path(file.path) for file in sources])) is not None:
        out.mkdir()
        write_file_outline(source.ahead, out, kept, places)
        write_sources(out, sources)


def _check(source: Checkpoint, context: int | None) -> None:
    """Raises UsageError for a checkpoint whose model does not support `context`, and what `validate` does."""
    source.validate()
    checked_context(source.spec, context, 1)


def how_to_pack(source: Checkpoint, dtype: str) -> tuple[Codec, Kept | None]:
    """What weights are quantized to, and which are kept, where a pack has the `dtype` of that name."""
    return (Codec.INT8, kept_of(source)) if dtype == AUTO else (Codec(dtype), None)


def _write(source: Checkpoint, out: Path, dtype: str, progress: Progress, move: Move | None = None) -> Manifest:
    codec, kept = how_to_pack(source, dtype)
    encoder = None if kept is None else KeptEncoder(source, kept)

    def report(file: str, done: int, total: int) -> None:
        progress("packing", done, total)

    def ahead(folder: Path) -> None:
        if source.ahead is not None and not is_pack(folder):
            _write(source.ahead, folder, dtype, progress)

    return pack(source, out, codec, progress=report, encoder=encoder, kept=kept, move=move, ahead=ahead)


def _fetching(progress: Progress) -> Progress:
    return lambda title, done, total: progress("fetching", done, total)


def main() -> int:
    checkpoint, dtype, cache, *asked = sys.argv[1:]
    context = int(asked[0]) if asked else None

    def job(progress: Progress) -> dict[str, Any]:
        if dtype == OUTLINE:
            return {"pack": str(cached_outline(checkpoint, Path(cache), progress, context))}
        return {"pack": str(cached_pack(checkpoint, dtype, Path(cache), progress, context))}

    return run(job)


if __name__ == "__main__":
    sys.exit(main())
