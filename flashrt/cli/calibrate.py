"""flashrt calibrate: find out what a token can do without, and what that costs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashrt.cli import options
from flashrt.cli.calibrate_kv import calibrate_attention
from flashrt.cli.console import Progress, duration, emit, show, table
from flashrt.cli.run import read_text
from flashrt.engine.options import LoadOptions
from flashrt.errors import UsageError

if TYPE_CHECKING:
    from flashrt.sparsity import Sparsity

DEFAULT_LOSS = 0.02
CHANNEL_COLUMNS = {
    "channels": "channels",
    "whole_channels": "of them whole",
    "stored_whole": "stored whole",
    "rows": "rows kept",
    "bytes": "bytes",
}
ROW_COLUMNS = {
    "rows": "rows kept",
    "recall": "recall",
    "predictor": "predictor",
    "bytes": "bytes",
    "heads": "heads kept",
}


def register(app: typer.Typer, name: str, guarded: Callable[..., Any]) -> None:
    app.command(name)(guarded(calibrate))


@options.loads("budget_gb", "kv_dir", "threads", "cache_dir")
def calibrate(
    pack: Annotated[
        Path,
        typer.Argument(
            metavar="PACK",
            show_default=False,
            help="A pack of a dense model: of ReLU and its kin in any dtype, else in int4.",
        ),
    ],
    text_file: Annotated[
        Path | None,
        typer.Option(
            "--text-file",
            metavar="FILE",
            show_default=False,
            help="UTF-8 text to calibrate with. Omitted: text that the model writes itself.",
        ),
    ] = None,
    kv: Annotated[
        bool,
        typer.Option(
            "--kv",
            help="Calibrate attention instead, of any pack, for `run --kv sparse`: labels of keys, by which a token "
            "chooses what it attends to.",
        ),
    ] = False,
    max_loss: Annotated[
        float | None,
        typer.Option(
            "--max-loss",
            metavar="SHARE",
            show_default=False,
            help="How much perplexity may rise: 0.02 is 2%, which is meant where it is omitted.",
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens",
            min=1,
            metavar="N",
            show_default=False,
            help="Tokens of text to calibrate with. Omitted: 2048, or 8192 where neurons are to be predicted (ReLU); "
            "with --kv 16384, of which 8192 are held out.",
        ),
    ] = None,
    *,
    load: LoadOptions,
    json: options.Json = False,
) -> None:
    """Find out which weights tokens can do without, within a loss that is set beforehand, for `run --mode sparse`.

    Writes a second copy of the weights, in another order, inside the pack; the pack itself stays as it is. Interrupted,
    it goes on where it was when it is run again. A second calibration replaces the first. Runs are supposed to have the
    same budget: where it is too small for the model, fewer bytes are stored, so that fewer stream, rather than fewer
    computed.

    Example: flashrt calibrate ./qwen-int4 --max-loss 0.02
    """
    text = None if text_file is None else read_text(text_file)
    if kv:
        if max_loss is not None:
            raise UsageError("--max-loss is not for --kv, whose losses are measured at several shares kept")
        return calibrate_attention(pack, load, text, tokens, json)
    from flashrt.calibration.pipeline import Request
    from flashrt.calibration.pipeline import calibrate as run

    request = Request(DEFAULT_LOSS if max_loss is None else max_loss, text, tokens)
    began = time.perf_counter()
    with Progress("") as progress:
        sparsity = run(pack, load, request, progress)
    seconds = time.perf_counter() - began
    if json:
        emit({"path": str(pack), "seconds": seconds, **sparsity.to_json()})
        return
    show(_table(sparsity))
    figures = sparsity.figures
    source = "text of the model's own; other text may lose more" if text is None else "tokens of the text held out"
    print(
        f"predicted loss    {sparsity.held_out_loss:.2%}, {sparsity.max_loss:.2%} allowed; on {source}\n"
        f"bytes touched     {figures['bytes']:.1%} of the feed-forward blocks' per token\n"
        f"calibrated in     {duration(seconds)}; use it with `flashrt run {pack} --mode sparse`"
    )


def _table(sparsity: Sparsity) -> Any:
    columns = ROW_COLUMNS if sparsity.rows else CHANNEL_COLUMNS
    result = table("layer", *columns.values())
    for i, shares in enumerate(sparsity.figures["layers"]):
        result.add_row(str(i), *(f"{shares[key]:.0%}" for key in columns))
    return result
