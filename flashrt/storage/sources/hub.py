"""A repository of the Hugging Face hub, downloaded into the hub's own cache."""

from __future__ import annotations

from pathlib import Path

from flashrt.errors import CheckpointError
from flashrt.storage.sources.checkpoint import Checkpoint
from flashrt.storage.sources.huggingface import open_directory

# Weights in other formats, and consolidated copies of the same weights, are left where they are.
PATTERNS = (
    "config.json",
    "adapter_config.json",  # so that an adapter is named as one
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.j*",
    "vocab.json",
    "merges.txt",
    "model*.safetensors",
    "model.safetensors.index.json",
)


def open_repository(name: str, cache: Path | None = None) -> Checkpoint:
    """Download what is needed of `org/name` (only what is missing) and open it. Raises CheckpointError."""
    return open_directory(_download(name, cache), name=name.split("/")[1], source=f"Hugging Face hub {name}")


def fetch_repository(name: str, out: Path | None = None) -> Path:
    """Download what is needed of `org/name` into the directory `out`, or into the hub's cache; return where it is."""
    return _download(name, None, out)


def _download(name: str, cache: Path | None, out: Path | None = None) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise CheckpointError(
            f"{name} names a hub repository, and huggingface_hub is not installed: pip install huggingface_hub"
        ) from error
    from huggingface_hub import errors

    try:
        return Path(snapshot_download(name, allow_patterns=list(PATTERNS), cache_dir=cache, local_dir=out))
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
