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

    Labels of keys that lie beside it, for --kv sparse, are checked too.

    Example: flashrt verify ./qwen-int4
    """
    from flashrt.storage.kv_labels import find_labels
    from flashrt.storage.pack import Pack

    opened = Pack(pack)
    began = time.perf_counter()
    with Progress() as progress:
        opened.verify(progress.of("verifying"))
        labels = find_labels(opened)
    seconds = time.perf_counter() - began
    nbytes = opened.layout.nbytes
    if json:
        has_labels = labels is not None
        emit({"path": str(pack), "bytes": nbytes, "kv_labels": has_labels, "seconds": seconds, "intact": True})
    else:
        beside = "" if labels is None else ", and labels of its keys"
        print(f"{pack} is intact: {size(nbytes)}{beside} in {duration(seconds)}, {rate(nbytes / seconds)}")
