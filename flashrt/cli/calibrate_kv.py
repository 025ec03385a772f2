"""flashrt calibrate --kv: find out by what tokens can choose which others they attend to."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrt.cli.console import Progress, duration, emit, show, table
from flashrt.engine.options import LoadOptions

if TYPE_CHECKING:
    from flashrt.calibration.kv_pipeline import KvCalibration


def calibrate_attention(pack: Path, load: LoadOptions, text: str | None, tokens: int | None, json: bool) -> None:
    """Calibrate, and print what came of it."""
    from flashrt.calibration.kv_pipeline import KvRequest, calibrate_kv

    began = time.perf_counter()
    with Progress("") as progress:
        found = calibrate_kv(pack, load, KvRequest(text, tokens), progress)
    seconds = time.perf_counter() - began
    labels = found.labels
    if json:
        figures = {
            "errors": found.errors,
            "uniform_error": found.uniform_error,
            "divided_error": found.divided_error,
        }
        emit({"path": str(pack), "seconds": seconds, **labels.describe(), **figures})
        return
    show(_table(found))
    source = "this program's source" if text is None else "the end of the text"
    losses = ", ".join(f"{loss:+.2%} at {keep}" for keep, loss in labels.losses.items())
    print(
        f"perplexity        {losses}; on {source}\n"
        f"error at 1/16     {found.divided_error:.2%} of what heads give, squared, on {source}; "
        f"{found.uniform_error:.2%} where every head keeps as much\n"
        f"calibrated in     {duration(seconds)}; use it with `flashrt run {pack} --kv sparse`"
    )


def _table(found: KvCalibration) -> Any:
    result = table("layer", "numbers of a label", "error at 1/16", "shares by KV head")
    labels = found.labels
    for i, (layer, error, shares) in enumerate(zip(labels.layers, found.errors, labels.shares, strict=True)):
        if layer is None or error is None:
            result.add_row(str(i), "-", "-", "attends to all it sees")
        else:
            result.add_row(str(i), str(layer.channels), f"{error:.2%}", " ".join(f"{share:g}" for share in shares))
    return result
