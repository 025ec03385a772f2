"""flashrt eval quality: what sparse mode costs on a text."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from flashrt.cli import options
from flashrt.cli.console import Progress, emit, show, table
from flashrt.cli.run import read_text
from flashrt.cli.texts import first_ids
from flashrt.engine.options import LoadOptions
from flashrt.errors import UsageError

DEFAULT_TOKENS, DEFAULT_CTX = 1024, 256
COLUMNS = {
    "channels": "channels",
    "whole_channels": "of them whole",
    "rows": "rows",
    "recall": "recall",
    "precision": "precision",
    "predictor": "predictor",
    "bytes": "bytes",
    "heads": "heads",
}


@options.loads("budget_gb", "rope_scaling", "kv_dir", "threads", "cache_dir", mode="sparse", speculate="off")
def quality(
    pack: options.Model,
    text_file: Annotated[
        Path, typer.Option("--text-file", metavar="FILE", show_default=False, help="UTF-8 text to predict.")
    ],
    ctx: Annotated[
        int, typer.Option("--ctx", min=32, metavar="N", help="Tokens of a window; every window starts afresh.")
    ] = DEFAULT_CTX,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=32, metavar="N", help="Tokens of the text to predict, from its start.")
    ] = DEFAULT_TOKENS,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", show_default=False, help="Save the table as a plot (.png, .svg, .pdf)."),
    ] = None,
    *,
    load: LoadOptions,
    json: options.Json = False,
) -> None:
    """Compare sparse mode with exact mode on a text: perplexity, divergence, agreement, and what each block touched.

    Both compute as decoding does, in passes of at most 16 tokens.

    Example: flashrt eval quality ./qwen-int4 --text-file book.txt
    """
    from flashrt.budget.plan import Workload
    from flashrt.calibration.evaluation import Reference, figures, select
    from flashrt.cli import session
    from flashrt.config import checked_context
    from flashrt.engine.loaded_pack import LoadedPack
    from flashrt_kernels.limits import NARROW_TOKENS

    if plot is not None:
        check_plots()
    text = read_text(text_file)
    load = replace(load, context=ctx)
    with Progress("tokens") as progress:
        sparse = session.open_model(pack, load)  # refuses what is not calibrated, before an hour is spent
        exact = LoadedPack(sparse.exact, replace(load, mode="exact"), sparse.runtime)
        window = checked_context(exact.spec, ctx, DEFAULT_CTX)
        workload = Workload(window, prompt=window, logit_rows=NARROW_TOKENS)
        ids = first_ids(exact.tokenizer, text, max_tokens)
        prefix = exact.tokenizer.encode("")
        step = window - len(prefix)
        windows = [[*prefix, *ids[i : i + step]] for i in range(0, len(ids), step)]
        windows = [w for w in windows if len(w) > 1]
        if not windows:
            raise UsageError(f"{text_file} has fewer than two tokens: there is nothing to predict")
        with session.load(exact, workload) as engine:
            reference = Reference(engine, windows, load.cache, progress)
        with reference, session.load(sparse, workload) as engine:
            found = reference.divergence(engine, progress)
            result = figures(found, engine, select(engine, windows))
    if plot is not None:
        save_plot(result, plot)
    if json:
        emit(result)
    else:
        show(_table(result["layers"]))
        print("\n".join(_lines(result)))


def _table(layers: list[dict[str, float]]) -> Any:
    shown = [key for key in COLUMNS if key in layers[0]]
    result = table("layer", *(COLUMNS[key] for key in shown))
    for i, layer in enumerate(layers):
        result.add_row(str(i), *(f"{layer[key]:.0%}" for key in shown))
    return result


def _lines(result: dict[str, Any]) -> list[str]:
    return [
        f"perplexity        exact {result['ppl_exact']:.4f}, sparse {result['ppl_sparse']:.4f}: "
        f"{result['loss']:+.2%}, {result['max_loss']:.2%} promised, over {result['tokens']} tokens",
        f"divergence        mean {result['kl_mean']:.4f}, worst {result['kl_max']:.3f} nats; "
        f"the same first choice for {result['top1_agreement']:.1%}",
        f"touched           {result['ffn_bytes_share']:.1%} of the feed-forward blocks' bytes, "
        f"{result['rows_share']:.1%} of the " + ("neurons" if result["method"] == "rows" else "rows of down"),
    ]


def check_plots() -> None:
    """Raises UsageError when nothing is there to draw with."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: install it with `pip install 'flashrt[plots]'`")


def save_plot(result: dict[str, Any], path: Path) -> None:
    """Draw shares by layer. Raises UsageError for a kind of file that cannot be drawn."""
    importlib.import_module("matplotlib").use("agg")
    figure, axes = importlib.import_module("matplotlib.pyplot").subplots(figsize=(8, 4), layout="constrained")
    labels = {"bytes": "bytes touched", "channels": "channels", "rows": "rows of down", "recall": "recall"}
    for key, label in ((key, label) for key, label in labels.items() if key in result["layers"][0]):
        axes.plot([layer[key] for layer in result["layers"]], label=label, marker="o", markersize=3)
    axes.set(xlabel="layer", ylabel="share", ylim=(0, 1.02))
    axes.set_title(f"perplexity {result['loss']:+.2%} at {result['ffn_bytes_share']:.0%} of the FFN's bytes")
    axes.legend()
    try:
        figure.savefig(path, dpi=120)
    except ValueError as error:
        raise UsageError(f"{path} cannot be drawn: {error}") from None
