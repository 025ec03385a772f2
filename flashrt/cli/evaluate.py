"""flashrt eval: how well a pack models text, and whether it finds what a text says."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from flashrt.cli import options
from flashrt.cli.console import Progress, duration, emit, size
from flashrt.cli.quality import quality
from flashrt.cli.retrieval import retrieval
from flashrt.cli.run import read_text
from flashrt.cli.texts import first_ids
from flashrt.engine.options import LoadOptions
from flashrt.errors import UsageError

DEFAULT_CTX = 1024


def register(app: typer.Typer, name: str, guarded: Callable[..., Any]) -> None:
    group = typer.Typer(no_args_is_help=True)
    group.callback()(_eval)
    group.command("ppl")(guarded(ppl))
    group.command("quality")(guarded(quality))
    group.command("retrieval")(guarded(retrieval))
    app.add_typer(group, name=name)


def _eval() -> None:
    """Measure quality: the perplexity of a text, what sparse mode costs on it, and retrieval from long prompts."""


@options.loads(
    "budget_gb",
    "rope_scaling",
    "experts_used",
    "dtype",
    "mode",
    "max_loss",
    *options.KV,
    *options.MACHINE,
    speculate="off",
)
def ppl(
    pack: options.Model,
    text_file: Annotated[
        Path, typer.Option("--text-file", metavar="FILE", show_default=False, help="UTF-8 text to score.")
    ],
    ctx: Annotated[
        int | None,
        typer.Option(
            "--ctx",
            min=2,
            metavar="N",
            show_default=False,
            help="Tokens of a window, up to what the model supports; every window starts afresh. "
            "Omitted: 1024, or the model's.",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", min=2, metavar="N", show_default=False, help="Score the first N tokens only."),
    ] = None,
    as_decoded: Annotated[
        bool,
        typer.Option(
            "--as-decoded",
            help="Compute with the kernels of decoding: slower, and they round otherwise. --kv sparse always does.",
        ),
    ] = False,
    *,
    load: LoadOptions,
    json: options.Json = False,
) -> None:
    """Perplexity of a text, in consecutive windows.

    Example: flashrt eval ppl demo --text-file book.txt --ctx 1024 --max-tokens 20000 --budget-gb 1 --json
    """
    text = read_text(text_file)
    if not text:
        raise UsageError(f"{text_file} is empty: there is nothing to score")

    from flashrt.budget.plan import Workload
    from flashrt.cli import session
    from flashrt.config import checked_context
    from flashrt.machine.process import peak_resident_bytes

    as_decoded = as_decoded or load.kv == "sparse"
    scored_so_far = Progress("tokens")
    model = session.open_model(pack, replace(load, context=ctx))
    window = checked_context(model.spec, ctx, DEFAULT_CTX)
    ids = first_ids(model.tokenizer, text, max_tokens)
    with session.load(model, Workload(window, prompt=min(window, len(ids)), scoring=True)) as engine, scored_so_far:
        began = time.perf_counter()
        perplexity, scored = engine.score(ids, window, scored_so_far.of("scoring"), as_decoded)
        seconds = time.perf_counter() - began
        result: dict[str, Any] = {
            "ppl": perplexity,
            "tokens": scored,
            "ctx": window,
            "as_decoded": as_decoded,
            "seconds": seconds,
            "tok_per_s": scored / seconds,
            "bytes_read": engine.reader.bytes_read,
            "budget_bytes": engine.plan.budget_bytes,
            "peak_rss_bytes": peak_resident_bytes(),
            "device_peak_bytes": engine.runtime.peak_bytes(),
            "plan": engine.plan.to_json(),
        }
    if json:
        emit(result)
    else:
        peak = f"peak memory {size(result['peak_rss_bytes'])} of {size(result['budget_bytes'])}"
        print(f"perplexity {perplexity:.4f} over {scored} tokens in windows of {window} ({duration(seconds)}, {peak})")
