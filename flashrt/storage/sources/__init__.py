"""Checkpoints to pack from: Hugging Face directories, GGUF files, hub repositories and the demo models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flashrt.errors import CheckpointError
from flashrt.storage.gguf_files import only_gguf
from flashrt.storage.names import CHECKPOINTS, DEMO_NAMES, default_cache, exists, is_repository
from flashrt.storage.sources.checkpoint import Checkpoint
from flashrt.storage.sources.files import refuse_other_formats

__all__ = ["Checkpoint", "open_checkpoint"]


def open_checkpoint(
    where: str | Path, cache: Path | None = None, progress: Callable[[str, int, int], None] | None = None
) -> Checkpoint:
    """Open a directory (of safetensors, or with a GGUF file), a GGUF file or the first of its parts, a hub repository
    ('org/name', 'org/name:Q4_K_M' for one of its GGUF files) or a demo model ('demo', 'demo-small').

    cache: where demo models are kept (by default below flashrt's own); hub repositories go to the hub's own cache
    progress: called with (what, parts done, parts in all) while a demo model is fetched
    Headers are read, weights are not, but for a head that is stored beside an embedding which it is said to be. Call
    `validate()` before converting. Raises CheckpointError or UsageError.
    """
    from flashrt.storage.sources.demo import DEMOS, fetch_demo
    from flashrt.storage.sources.gguf import open_gguf
    from flashrt.storage.sources.hub import open_repository
    from flashrt.storage.sources.huggingface import open_directory

    name, path = str(where), Path(where)
    if name in DEMO_NAMES:
        demo = fetch_demo(name, cache or default_cache() / CHECKPOINTS, progress)
        return open_gguf(demo, source=f"{name}: {DEMOS[name].title}")
    if exists(path):
        if path.is_dir():
            return open_gguf(path / gguf) if (gguf := only_gguf(path)) else open_directory(path)
        if not path.is_file():
            raise CheckpointError(f"{path} is neither a directory nor a file")
        if path.suffix == ".safetensors":
            raise CheckpointError(f"{path} is one file of a checkpoint: give the directory it lies in")
        refuse_other_formats(path)
        return open_gguf(path)
    if is_repository(name):
        return open_repository(name)
    raise CheckpointError(
        f"{name} does not exist: expected a directory, a GGUF file, a hub repository (org/name, or "
        "org/name:Q4_K_M for one of its GGUF files) or one of " + ", ".join(DEMO_NAMES)
    )
