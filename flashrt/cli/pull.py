"""flashrt pull: fetch a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from flashrt.cli import options
from flashrt.cli.console import Progress, emit
from flashrt.errors import UsageError


def register(app: typer.Typer, name: str, guarded: Callable[..., Any]) -> None:
    app.command(name)(guarded(pull))


def pull(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            show_default=False,
            help="demo (Qwen2.5-Coder-1.5B-Instruct, 1.1 GB), demo-small (Gemma 3 270M, 0.25 GB), "
            "or a hub repository (org/name; org/name:Q4_K_M for one of its GGUF files).",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", show_default=False, help="Where to put it. Omitted: the cache."),
    ] = None,
    cache_dir: options.CacheDir = None,
    json: options.Json = False,
) -> None:
    """Fetch a checkpoint and print where it is. What is already there, and intact, is not fetched again.

    Example: flashrt pull demo
    """
    from flashrt.checkpoints.pack_job import fetch_checkpoint
    from flashrt.storage.names import DEMO_NAMES, default_cache, is_remote

    if not is_remote(name):
        raise UsageError(f"{name!r} cannot be fetched: expected {', '.join(DEMO_NAMES)} or a hub repository (org/name)")
    with Progress() as progress:
        path = fetch_checkpoint(name, cache_dir or default_cache(), out, progress)
    if json:
        emit({"path": str(path)})
    else:
        print(path)
