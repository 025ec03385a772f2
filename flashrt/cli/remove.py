"""flashrt remove: take packs out of the cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from flashrt.cli import options
from flashrt.cli.console import emit, size


def register(app: typer.Typer, name: str, guarded: Callable[..., Any]) -> None:
    app.command(name)(guarded(remove))


def remove(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="PACK...",
            show_default=False,
            help="Packs as `flashrt models` lists them, or the model, repository or demo of the only one of it.",
        ),
    ],
    cache_dir: options.CacheDir = None,
    json: options.Json = False,
) -> None:
    """Delete packs from the cache. Checkpoints, and packs that lie elsewhere, stay.

    Example: flashrt remove demo
    """
    from flashrt.checkpoints import shelf
    from flashrt.storage.names import default_cache

    packs = shelf.shelved_packs(cache_dir or default_cache())
    found = {(pack := shelf.named(packs, name)).name: pack for name in names}  # all, before the first one goes
    for pack in found.values():
        shelf.remove(pack)
        if not json:
            print(f"removed {pack.name}, {size(pack.nbytes)}")
    if json:
        emit({"removed": list(found), "bytes": sum(pack.nbytes for pack in found.values())})
