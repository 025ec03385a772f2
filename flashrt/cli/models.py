"""flashrt models: the packs in the cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import typer

from flashrt.cli import options
from flashrt.cli.console import emit, show, size, table

if TYPE_CHECKING:
    from flashrt.checkpoints.shelf import ShelvedPack


def register(app: typer.Typer, name: str, guarded: Callable[..., Any]) -> None:
    app.command(name)(guarded(models))


def models(cache_dir: options.CacheDir = None, json: options.Json = False) -> None:
    """List the packs in the cache: those that were made when a checkpoint was first used.

    Example: flashrt models
    """
    from flashrt.checkpoints.shelf import shelved_packs
    from flashrt.storage.names import default_cache

    cache = cache_dir or default_cache()
    packs = shelved_packs(cache)
    if json:
        emit({"cache": str(cache), "packs": [_facts(pack) for pack in packs]})
        return
    if not packs:
        print(f"{cache} holds no packs")
        return
    result = table("pack", "on disk", "weights", "of")
    for column in result.columns[2:]:
        column.justify = "left"
    for pack in packs:
        weights, source = "", pack.problem
        if pack.manifest is not None:
            weights, source = pack.manifest.weights, pack.manifest.source
        result.add_row(pack.name, size(pack.nbytes), weights, source)
    show(result)
    print(f"{size(sum(pack.nbytes for pack in packs))} in {cache}; `flashrt remove PACK` takes one away")


def _facts(pack: ShelvedPack) -> dict[str, Any]:
    manifest = pack.manifest
    return {
        "name": pack.name,
        "path": str(pack.path),
        "bytes": pack.nbytes,
        "model": None if manifest is None else manifest.name,
        "source": None if manifest is None else manifest.source,
        "dtype": None if manifest is None else manifest.weights,
        "problem": pack.problem,
    }
