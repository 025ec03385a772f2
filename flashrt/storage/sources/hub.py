"""A repository of the Hugging Face hub, downloaded into the hub's own cache."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from pathlib import Path

from flashrt.errors import CheckpointError
from flashrt.storage.gguf_files import models_among, only_gguf, part_names, pick
from flashrt.storage.names import repository_of
from flashrt.storage.room import check_room
from flashrt.storage.sources.checkpoint import Checkpoint
from flashrt.storage.sources.files import refuse_pickles
from flashrt.storage.sources.gguf import open_gguf
from flashrt.storage.sources.huggingface import open_directory
from flashrt.storage.sources.text import TEXT_FILES

TIMEOUT_S = 10.0  # for what a repository holds
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")
# Weights in other formats, and consolidated copies of the same weights, are left where they are.
PATTERNS = (
    "config.json",
    "adapter_config.json",  # so that an adapter is named as one
    "generation_config.json",
    *TEXT_FILES,
    *WEIGHTS,
)


def open_repository(name: str, cache: Path | None = None) -> Checkpoint:
    """Download what is needed of `org/name` (only what is missing) and open it. Raises CheckpointError.

    org/name:Q4_K_M names one of a repository's GGUF files.
    """
    where = _fetched(name, cache)
    title, source = repository_of(name)[0].split("/")[1], f"Hugging Face hub {name}"
    if where.is_dir():
        return open_directory(where, name=title, source=source)
    return open_gguf(where, source=source)


def fetch_repository(name: str, out: Path | None = None) -> Path:
    """Download what is needed of `org/name` into the directory `out`, or into the hub's cache; return where it is."""
    return _fetched(name, None, out)


def _fetched(name: str, cache: Path | None, out: Path | None = None) -> Path:
    """The directory of a repository, or the GGUF file that is meant in it, downloaded unless it is there."""
    repository, tag = repository_of(name)
    files = listing(repository)
    if files is None:  # nobody to ask: what was downloaded before is there
        directory = _download(repository, PATTERNS, cache, out)
        gguf = only_gguf(directory, tag)
        return directory if gguf is None else directory / gguf
    gguf = meant(files, tag, name)
    if gguf is None:
        return _download(repository, PATTERNS, cache, out)
    return _download(repository, tuple(part_names(gguf)), cache, out) / gguf


def meant(files: list[str], tag: str | None, name: str) -> str | None:
    """The GGUF file that is meant among a repository's files; None where its safetensors are.

    Raises CheckpointError.
    """
    if tag is None and (any(map(_is_weights, files)) or not models_among(files)):
        refuse_pickles(files, name)
        return None
    return pick(files, tag, name)


def _is_weights(file: str) -> bool:
    return any(fnmatch.fnmatchcase(file, pattern) for pattern in WEIGHTS)


def listing(repository: str) -> list[str] | None:
    """The names of a repository's files; None when the hub does not say."""
    try:
        from huggingface_hub import HfApi

        found = HfApi().model_info(repository, timeout=TIMEOUT_S).siblings
        return [entry.rfilename for entry in found or ()]
    except Exception:  # network libraries raise many kinds; the download that follows says what is wrong
        return None


def downloaded(repository: str) -> Path:
    """Where a repository lies that was downloaded before. Raises CheckpointError where none is."""
    return _download(repository, PATTERNS, None, None, local=True)


@dataclass(frozen=True, slots=True)
class _Missing:
    """Bytes of a download that are not there yet, and the folder that they come to."""

    folder: Path
    nbytes: int


def _missing(name: str, patterns: tuple[str, ...], cache: Path | None, out: Path | None) -> _Missing | None:
    """What a download lacks, but for what an interrupted one left; None when the hub does not say."""
    try:
        from huggingface_hub import constants, snapshot_download

        files = snapshot_download(name, allow_patterns=list(patterns), cache_dir=cache, local_dir=out, dry_run=True)
        folder = out or Path(cache or constants.HF_HUB_CACHE)
        own = out / ".cache" if out is not None else folder / f"models--{name.replace('/', '--')}"
        begun = sum(file.stat().st_blocks * 512 for file in own.rglob("*.incomplete"))
        return _Missing(folder, max(sum(file.file_size or 0 for file in files if file.will_download) - begun, 0))
    except Exception:  # network libraries raise many kinds; the download that follows says what is wrong
        return None


def _download(name: str, patterns: tuple[str, ...], cache: Path | None, out: Path | None, local: bool = False) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise CheckpointError(
            f"{name} names a hub repository, and huggingface_hub is not installed: pip install huggingface_hub"
        ) from error
    from huggingface_hub import errors

    if not local and (missing := _missing(name, patterns, cache, out)) is not None:
        check_room(missing.folder, missing.nbytes, f"the download of {name}", "or choose another directory")
    try:
        found = snapshot_download(
            name, allow_patterns=list(patterns), cache_dir=cache, local_dir=out, local_files_only=local
        )
        return Path(found)
    except errors.GatedRepoError as error:
        raise CheckpointError(f"{name} is gated: accept its terms on the hub and log in (hf auth login)") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"the hub has no repository {name}, or it is private: check the name, or log in"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{name} is not in the local cache and the hub cannot be reached: check the network, "
            "or give the path of a downloaded directory or GGUF file"
        ) from error
    except Exception as error:  # network libraries raise many kinds, none of which the user can do more about
        raise CheckpointError(f"{name} could not be downloaded from the hub: {error}") from error
