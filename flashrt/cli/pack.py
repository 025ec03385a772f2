"""flashrt pack: convert a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashrt.cli import options
from flashrt.cli.console import Progress, duration, emit, size

if TYPE_CHECKING:
    from flashrt.storage.kept import Kept


def register(app: typer.Typer, name: str, guarded: Callable[..., Any]) -> None:
    app.command(name)(guarded(pack))


def pack(
    checkpoint: options.Checkpoint,
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", show_default=False, help="Directory of the pack: new, or unfinished."),
    ],
    dtype: options.PackDtype = options.DtypeName.AUTO,
    delete_source: Annotated[
        bool,
        typer.Option(
            "--delete-source",
            help="Move instead of copying: delete each file of weights once all that was packed from it is on disk.",
        ),
    ] = False,
    cache_dir: options.CacheDir = None,
    json: options.Json = False,
) -> None:
    """Convert a checkpoint into a pack, which every other command runs from.

    Works tensor by tensor in bounded memory. Interrupted or killed, it goes on where it was when it is run again; with
    --delete-source too, as what is not packed yet is still there.

    Example: flashrt pack model-Q4_K_M.gguf ./model
    Example: flashrt pack ./Qwen2.5-7B-Instruct ./qwen-int4 --dtype int4
    """
    from flashrt.checkpoints.pack_job import move_checkpoint, pack_checkpoint
    from flashrt.storage.names import default_cache

    began = time.perf_counter()
    with Progress() as progress:
        if delete_source:
            manifest = move_checkpoint(checkpoint, out, dtype.value, progress)
        else:
            manifest = pack_checkpoint(checkpoint, out, dtype.value, cache_dir or default_cache(), progress)
    seconds = time.perf_counter() - began
    layout = manifest.layout
    bits = 8 * sum(t.nbytes for t in layout.tensors.values()) / manifest.spec.parameters
    result = {
        "path": str(out),
        "name": manifest.name,
        "dtype": manifest.weights,
        "requantized": {} if manifest.kept is None else manifest.kept.requantized,
        "bytes": layout.nbytes,
        "parameters": manifest.spec.parameters,
        "bits_per_weight": bits,
        "seconds": seconds,
    }
    if json:
        emit(result)
    else:
        print(
            f"{out}: {manifest.name} as {manifest.weights}, {size(layout.nbytes)}, "
            f"{bits:.2f} bits per weight, {duration(seconds)}"
        )
        if manifest.kept is not None and (line := _requantized_line(manifest.kept)):
            print(line)


def _requantized_line(kept: Kept) -> str:
    """What could not be kept, and what it has become; nothing where all was."""
    found: dict[tuple[str, str], int] = {}
    for name, stored in kept.requantized.items():
        key = name.rpartition(".")[2], stored
        found[key] = found.get(key, 0) + 1
    parts = [f"{kind} ({stored}, {count} of them)" for (kind, stored), count in found.items()]
    return f"not kept, but quantized again to int8: {', '.join(parts)}" if parts else ""
