"""Files of a checkpoint, bounded before they are read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flashrt.errors import CheckpointError

MAX_JSON = 32 << 20  # bytes; the index of 140,000 tensors takes 16 MB
MAX_TOKENIZER = 128 << 20  # bytes; Gemma's takes 33 MB
MERGE_ADAPTER = "merge it into the model that it was made for, and name the result"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_UNPICKLE = (
    "a pickle, which is not read, because reading one runs whatever code it holds: where you trust it, load it with "
    "transformers and save it again (save_pretrained), which writes safetensors"
)
_ZIP, _PICKLE, _BEFORE_GGUF = b"PK\x03\x04", b"\x80", (b"lmgg", b"fmgg", b"tjgg", b"algg")
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def read_file(path: Path, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes. Raises FileNotFoundError or CheckpointError."""
    refuse_pointer(path)
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size > limit:
                raise CheckpointError(f"{path} has more than {limit >> 20} MiB: no file of that name is that large")
            return file.read(limit)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


def refuse_pointer(path: Path) -> None:
    """Raises CheckpointError for what git leaves in place of a large file when git-lfs is not installed."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_LFS_POINTER))
    except OSError:
        return  # whoever reads the file says what is wrong
    if start == _LFS_POINTER:
        raise CheckpointError(
            f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` where it was cloned, "
            "or download the file"
        )


def refuse_pickles(names: Iterable[str], where: str) -> None:
    """Raises CheckpointError where the only weights among file names are pickles."""
    names = [name for name in names if "/" not in name]
    pickle = next((name for name in names if name.endswith(PICKLES)), None)
    if pickle is not None and not any(name.endswith(".safetensors") for name in names):
        raise CheckpointError(f"{where} holds no safetensors weights: {pickle} is {_UNPICKLE}")


def refuse_other_formats(path: Path) -> None:
    """Raises CheckpointError for a file of weights that is known not to be read, and says what to do instead."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError:
        return  # whoever reads the file says what is wrong
    if start == _ZIP or (start[:1] == _PICKLE and path.suffix in PICKLES):
        raise CheckpointError(f"{path} is {_UNPICKLE}")
    if start in _BEFORE_GGUF:
        raise CheckpointError(
            f"{path} is of a format older than GGUF: convert the model again, or download a GGUF file"
        )


def read_json(path: Path, limit: int = MAX_JSON, *, required: bool = True) -> dict[str, Any]:
    """A JSON object; an empty one for a file that is not there and not `required`. Raises CheckpointError."""
    try:
        value = json.loads(read_file(path, limit))
    except FileNotFoundError:
        if required:
            raise CheckpointError(f"{path} is missing: this is not a complete Hugging Face checkpoint") from None
        return {}
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return value
