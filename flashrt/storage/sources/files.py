"""Files of a checkpoint, bounded before they are read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from flashrt.errors import CheckpointError

MAX_JSON = 32 << 20  # bytes; the index of 140,000 tensors takes 16 MB
MAX_TOKENIZER = 128 << 20  # bytes; Gemma's takes 33 MB
MERGE_ADAPTER = "merge it into the model that it was made for, and name the result"
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
