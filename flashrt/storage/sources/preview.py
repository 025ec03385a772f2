"""A hub repository before it is downloaded: its small files, and of its weights the headers, read by HTTP ranges.

They are put into a directory as they would lie there once downloaded, weights as files of holes behind their headers.
So whatever opens a checkpoint opens a preview, and learns all but what weights are.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flashrt.arch.gguf import ROPE_FACTORS
from flashrt.errors import CheckpointError
from flashrt.storage.gguf_files import part_names
from flashrt.storage.names import repository_of
from flashrt.storage.sources.checkpoint import Checkpoint
from flashrt.storage.sources.files import MAX_TOKENIZER
from flashrt.storage.sources.gguf import open_gguf
from flashrt.storage.sources.gguf_header import MAX_HEADER as MAX_GGUF_HEADER
from flashrt.storage.sources.gguf_header import GgufHeader, TruncatedError, read_gguf_header
from flashrt.storage.sources.hub import PATTERNS, TIMEOUT_S, downloaded, listing, meant
from flashrt.storage.sources.huggingface import open_directory
from flashrt.storage.sources.safetensors_header import MAX_HEADER
from flashrt_kernels.limits import WIDEST_HEAD

FIRST_BYTES = 1 << 20  # of a file of weights: most headers are shorter
_NO_ENTRY, _NOTHING_THERE = (401, 403), 416

Progress = Callable[[int, int], None]  # files done, files in all


@dataclass(frozen=True, slots=True)
class Preview:
    """A checkpoint whose weights cannot be read, and the bytes of a download."""

    checkpoint: Checkpoint
    download_bytes: int


def open_preview(name: str, out: Path, progress: Progress = lambda *_: None) -> Preview | None:
    """Preview `org/name` or `org/name:Q4_K_M` in the directory `out`; None when the hub cannot be asked, and what was
    downloaded before is there.

    Raises CheckpointError where it does not hold what is needed, or nothing is there.
    """
    repository, tag = repository_of(name)
    files = listing(repository)
    if files is None:
        downloaded(repository)
        return None
    gguf = meant(files, tag, name)
    wanted = part_names(gguf) if gguf else [f for f in files if any(fnmatch.fnmatchcase(f, p) for p in PATTERNS)]
    total = 0
    for done, file in enumerate(wanted):
        progress(done, len(wanted))
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise CheckpointError(f"{repository} holds a file called {file!r}, which is no place in a repository")
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        total += _fetch(repository, file, out / file)
    title, source = repository.split("/")[1], f"Hugging Face hub {name}"
    if gguf:
        return Preview(open_gguf(out / gguf, source=source), total)
    return Preview(open_directory(out, name=title, source=source, headers_only=True), total)


def _fetch(repository: str, file: str, path: Path) -> int:
    """Put what is needed of a file at `path`; the bytes of the whole."""
    if path.suffix == ".gguf":
        return _fetch_gguf(repository, file, path)
    header = path.suffix == ".safetensors"
    data, size = _read(repository, file, 0, FIRST_BYTES if header else MAX_TOKENIZER)
    if header:
        end = 8 + int.from_bytes(data[:8], "little")
        if len(data) < end <= MAX_HEADER:
            data += _read(repository, file, len(data), end)[0]
    elif size > MAX_TOKENIZER:
        raise CheckpointError(f"{file} of {repository} has {size} bytes: no file of that name is that large")
    _write(path, data, size)
    return size


def _fetch_gguf(repository: str, file: str, path: Path) -> int:
    """The header, whose length nothing tells before its end, and tensors of factors of rotary embeddings."""
    data, size = _read(repository, file, 0, FIRST_BYTES)
    while (header := _parsed(path, data, size)) is None:
        data += _read(repository, file, len(data), min(2 * len(data), size, MAX_GGUF_HEADER))[0]
    _write(path, data, size)
    with path.open("r+b") as handle:
        for tensor in (header.tensors[name] for name in ROPE_FACTORS if name in header.tensors):
            if tensor.nbytes > 8 * WIDEST_HEAD:
                continue  # which is refused by its shape
            handle.seek(tensor.offset)
            handle.write(_read(repository, file, tensor.offset, tensor.offset + tensor.nbytes)[0])
    return size


def _parsed(path: Path, data: bytes, size: int) -> GgufHeader | None:
    """The header in the first bytes of a file; None where more of these are needed."""
    path.write_bytes(data)
    try:
        return read_gguf_header(path, size)
    except TruncatedError:
        if len(data) >= min(size, MAX_GGUF_HEADER):
            raise
        return None


def _write(path: Path, data: bytes, size: int) -> None:
    """Write the first bytes of a file, and a hole for the rest."""
    with path.open("wb") as handle:
        handle.write(data)
        handle.truncate(size)


def _read(repository: str, file: str, start: int, stop: int) -> tuple[bytes, int]:
    """Bytes start:stop of a file, as far as there are so many, and its size. Raises CheckpointError."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session

    url, headers = hf_hub_url(repository, file), {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}"}
    headers["Accept-Encoding"] = "identity"
    data = bytearray()
    try:
        stream = get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=TIMEOUT_S)
        with stream as answer:
            if answer.status_code in _NO_ENTRY:
                raise CheckpointError(f"{repository} is gated: accept its terms on the hub and log in (hf auth login)")
            if answer.status_code == _NOTHING_THERE and start == 0:  # an empty file has no ranges
                return b"", 0
            answer.raise_for_status()
            whole = answer.headers.get("Content-Range", "").rpartition("/")[2]
            if not whole and start:
                raise CheckpointError(f"{file} of {repository}: the hub gives no ranges of it")
            size = int(whole or answer.headers["Content-Length"])
            for chunk in answer.iter_bytes():
                data += chunk
                if len(data) >= stop - start:
                    break
    except CheckpointError:
        raise
    except Exception as error:  # network libraries raise many kinds, none of which the user can do more about
        raise CheckpointError(f"{file} of {repository} cannot be read from the hub: {error}") from error
    return bytes(data[: stop - start]), size
