#!/usr/bin/env python3
"""Exact and sparse mode of a calibrated pack beside each other: speed under several budgets, and quality.

    python -m tools.benchmarks.sparse PACK --budgets 0.8 none --texts a.txt b.txt --out docs/benchmarks/sparse-NAME.json

Every run is a fresh process, without drafts, inside a memory cgroup of exactly its budget ('none': no limit). Exact and
sparse mode take turns at going first, and ratios are of neighbours. Quality is that of `flashrt eval quality`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashrt.storage.manifest import SPARSE_DIR
from flashrt.storage.pack import Pack
from tools.benchmarks.harness import facts, runs
from tools.benchmarks.harness.record import Benchmark, say
from tools.benchmarks.harness.samples import Sample, in_turn, median, only, ratios, spread, table
from tools.benchmarks.prompts import LONG_ANSWER

MODES = ("exact", "sparse")
FIGURES = ("decode_tok_per_s", "ttft_s", "bytes_read_per_token", "peak_rss_bytes", "ffn_bytes_share")
QUALITY = {
    "ppl_exact": ("perplexity, exact", "ppl"),
    "ppl_sparse": ("sparse", "ppl"),
    "loss": ("loss", "change"),
    "kl_mean": ("mean KL, nats", "number"),
    "kl_max": ("worst", "number"),
    "top1_agreement": ("same first choice", "permille"),
    "ffn_bytes_share": ("FFN bytes", "permille"),
    "rows_share": ("rows", "permille"),
}
KEPT = (*QUALITY, "max_loss", "predictor_bytes_share", "recall", "precision", "tokens")


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = Benchmark("tools.benchmarks.sparse", __doc__)
    parser = benchmark.parser
    parser.add_argument("pack", type=Path)
    parser.add_argument("--budgets", nargs="*", default=["none"], metavar="GIB", help="GiB, or none")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--prompt", default=LONG_ANSWER)
    parser.add_argument("--texts", type=Path, nargs="*", default=[])
    parser.add_argument("--text-tokens", type=int, default=1024)
    args = benchmark.parse(arguments)
    samples = [sample for budget in args.budgets for sample in speeds(args, budget)]
    qualities = [quality(args.pack, text, args.text_tokens) for text in args.texts]
    calibrated = Pack(args.pack / SPARSE_DIR).manifest.sparsity
    assert calibrated is not None
    losses = {"max_loss": calibrated.max_loss, "held_out_loss": calibrated.held_out_loss}
    shape = {name: getattr(args, name) for name in ("tokens", "repeat", "prompt", "text_tokens")}
    parameters = facts.pack(args.pack) | losses | shape
    tables = [speed_table(args.budgets, samples), quality_table(qualities)]
    text = (
        f"{parameters['model']}, {parameters['dtype']}, calibrated for a loss of {calibrated.max_loss:.1%}, "
        f"{calibrated.held_out_loss:.2%} found on held-out tokens. {args.repeat} runs of {args.tokens} tokens in turn; "
        "ratios of neighbours."
    )
    benchmark.publish(parameters, samples + qualities, {"text": [text], "tables": tables})


def speeds(args: argparse.Namespace, budget: str) -> list[Sample]:
    """Runs of both modes in turn."""
    samples = []
    options = runs.without_drafts(args.prompt, args.tokens)
    for turn in range(args.repeat):
        for mode in in_turn(MODES, turn):
            report = runs.flashrt_run(args.pack, budget, "--mode", mode, *options)
            figures = {name: report[name] for name in FIGURES}
            samples.append({"budget": budget, "mode": mode, "round": turn} | figures)
    return samples


def quality(pack: Path, text: Path, tokens: int) -> Sample:
    found = runs.flashrt_eval("quality", pack, "--text-file", str(text), "--max-tokens", str(tokens))
    say(f"{text.name}: {found['loss']:+.2%} at {found['ffn_bytes_share']:.1%} of the bytes")
    return {"text": text.name} | {name: found[name] for name in KEPT}


def speed_table(budgets: list[str], samples: list[Sample]) -> dict[str, Any]:
    rows = []
    for budget in budgets:
        exact, sparse = (only(samples, budget=budget, mode=mode) for mode in MODES)
        sooner = ratios(exact, sparse, "ttft_s")
        rows.append(
            [
                budget,
                *(spread(s["decode_tok_per_s"] for s in mode) for mode in (exact, sparse)),
                spread(ratios(sparse, exact, "decode_tok_per_s")),
                *(median(s["bytes_read_per_token"] for s in mode) for mode in (exact, sparse)),
                spread(sooner),
            ]
        )
    columns = [
        ("budget", "budget"), ("exact, tokens/s", "number"), ("sparse", "number"), ("ratio", "ratio"),
        ("exact reads per token", "MB"), ("sparse", "MB"), ("first token sooner by", "ratio"),
    ]  # fmt: skip
    return table(columns, rows)


def quality_table(qualities: list[Sample]) -> dict[str, Any]:
    return table(["text", *QUALITY.values()], [[q["text"], *(q[name] for name in QUALITY)] for q in qualities])


if __name__ == "__main__":
    main()
