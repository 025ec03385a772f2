"""flashrt verify: compare a pack with its checksums."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from flashrt.cli import options
from flashrt.cli.console import Progress, duration, emit, rate, size


def register(app: typer.Typer, name: str, guarded: Callable[..., Any]) -> None:
    app.command(name)(guarded(verify))


def verify(
    pack: Annotated[Path, typer.Argument(metavar="PACK", show_default=False, help="A pack made by `flashrt pack`.")],
    json: options.Json = False,
) -> None:
    """Read every byte of a pack and compare it with its checksums; fails naming the first damaged file.

    Example: flashrt verify ./qwen-int4
    """
    from flashrt.storage.pack import Pack

    opened = Pack(pack)
    began = time.perf_counter()
    with Progress() as progress:
        opened.verify(progress.of("verifying"))
    seconds = time.perf_counter() - began
    nbytes = opened.layout.nbytes
    if json:
        emit({"path": str(pack), "bytes": nbytes, "seconds": seconds, "intact": True})
    else:
        print(f"{pack} is intact: {size(nbytes)} in {duration(seconds)}, {rate(nbytes / seconds)}")
