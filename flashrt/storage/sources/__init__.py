"""Checkpoints to pack from: Hugging Face directories, GGUF files, hub repositories and the demo models."""

from __future__ import annotations

from pathlib import Path

from flashrt.errors import CheckpointError
from flashrt.storage.sources.checkpoint import Checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]


def open_checkpoint(where: str | Path) -> Checkpoint:
    """Open a directory or a GGUF file. Raises CheckpointError."""
    path = Path(where)
    if path.is_dir():
        from flashrt.storage.sources.huggingface import open_directory

        return open_directory(path)
    if path.is_file():
        from flashrt.storage.sources.gguf import open_gguf

        return open_gguf(path)
    raise CheckpointError(f"{where} is neither a directory, a GGUF file, a hub repository (org/name) nor a demo model")
