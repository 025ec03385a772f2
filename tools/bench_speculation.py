#!/usr/bin/env python3
"""What drafting brings: speed with and without it under several budgets, and what each of its parts brings.

    python -m tools.bench_speculation PACK --budgets 0.65 0.8 1 --out docs/benchmarks/speculation-NAME.json
    python -m tools.bench_speculation PACK --budgets 0.8 --ablation --out docs/benchmarks/speculation-parts-NAME.json

Questions of `tools.prompts` are answered greedily, in the model's chat template. Without --ablation every answer is a
fresh process inside a memory cgroup of exactly its budget ('none': no limit), with `--speculate off` and `auto` in
turns; both texts must be the same. --disk-gb-per-s slows a fast disk down: what drafting gains depends on the disk.
With --ablation the variants answer in turns in one process, which is not confined:

    off       no drafts
    lookup    drafts from the text alone
    static    resident neurons as they are after loading, no lookup
    adaptive  resident neurons follow the text, no lookup
    chain     the same, with the draft's own choices only: no second choices beside them
    all       what a run does

Prints JSON last.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from tools.machine import facts, in_child
from tools.prompts import SETS
from tools.run_in_cgroup import run_limited
from tools.slow_disk import slow_disk

GIB = 1 << 30
NO_LIMIT = 1 << 50
FIGURES = ("decode_tok_per_s", "tokens_per_pass", "positions_per_pass", "draft_s", "verify_s", "bytes_read_per_token")
RESIDENT, MODEL, DRAFTERS = "flashrt.cache.adaptive", "flashrt.speculate.model", "flashrt.engine.drafters"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--budgets", nargs="+", default=["0.8"], metavar="GIB")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--count", type=int, default=10, help="questions of each set")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--disk-gb-per-s", type=float, help="read no faster, whatever the disk can do (needs root)")
    parser.add_argument("--ablation", action="store_true")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    with slow_disk(args.pack, args.disk_gb_per_s):
        result = measured(args)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """All that was asked for."""
    measure = partial(in_child, ablation) if args.ablation else compare
    return {
        "tool": "bench_speculation",
        "command": command(args),
        "pack": args.pack.name,
        "tokens": args.tokens,
        "disk_gb_per_s": args.disk_gb_per_s,
        "machine": facts(),
        "budgets": {
            budget: {name: measure(args.pack, budget, SETS[name][: args.count], args.tokens) for name in args.sets}
            for budget in args.budgets
        },
    }


def command(args: argparse.Namespace) -> str:
    """What makes these figures again; files are anybody's own."""
    words = ["python -m tools.bench_speculation PACK --budgets", *args.budgets, "--sets", *args.sets]
    words += ["--count", str(args.count), "--tokens", str(args.tokens), *(["--ablation"] if args.ablation else [])]
    words += ["--disk-gb-per-s", str(args.disk_gb_per_s)] if args.disk_gb_per_s else []
    return " ".join(words)


def compare(pack: Path, budget: str, questions: tuple[str, ...], tokens: int) -> dict[str, Any]:
    """Medians over the questions, and the ratio of speeds."""
    runs = [[answer(pack, budget, question, tokens, mode) for mode in ("off", "auto")] for question in questions]
    speedups = [auto["decode_tok_per_s"] / off["decode_tok_per_s"] for off, auto in runs]
    return {
        "same_text": all(off["text"] == auto["text"] for off, auto in runs),
        "off": medians([off for off, _ in runs]),
        "auto": medians([auto for _, auto in runs]),
        "speedup": statistics.median(speedups),
        "speedups": speedups,
        "acceptance": acceptance([auto for _, auto in runs]),
        "peak_rss_bytes": max(run["peak_rss_bytes"] for pair in runs for run in pair),
    }


def answer(pack: Path, budget: str, question: str, tokens: int, mode: str) -> dict[str, Any]:
    """One run's report. Raises SystemExit, with its last words, where it fails."""
    command = [sys.executable, "-m", "flashrt", "run", str(pack), "--json", "--ignore-eos", "--chat"]
    command += ["--prompt", question, "--max-new-tokens", str(tokens), "--speculate", mode]
    command += [] if budget == "none" else ["--budget-gb", budget]
    outcome = run_limited(command, NO_LIMIT if budget == "none" else int(float(budget) * GIB))
    if outcome.returncode != 0:
        raise SystemExit(f"{mode} at {budget}: {outcome.stderr.strip().splitlines()[-1:]}")
    return dict(json.loads(outcome.stdout.splitlines()[-1]))


def medians(reports: list[dict[str, Any]]) -> dict[str, float]:
    return {name: statistics.median(report[name] for report in reports) for name in FIGURES}


def acceptance(reports: list[dict[str, Any]]) -> list[float]:
    """By depth, averaged over the answers that drafted so far."""
    found: list[list[float]] = []
    for report in reports:
        for depth, share in enumerate(report["acceptance"] or []):
            found += [[]] if depth == len(found) else []
            found[depth].append(share)
    return [statistics.mean(shares) for shares in found]


def ablation(pack: Path, budget: str, questions: tuple[str, ...], tokens: int) -> dict[str, Any]:
    """Medians over the questions, by variant."""
    from flashrt.budget.planner import Workload
    from flashrt.engine.loaded_pack import AUTO_DRAFT_TOKENS
    from flashrt.engine.open import open_model
    from flashrt.engine.options import LoadOptions

    gib = None if budget == "none" else float(budget)
    model = open_model(pack, LoadOptions(budget_gb=gib, speculate=AUTO_DRAFT_TOKENS))
    template = model.tokenizer.chat_template
    prompts = [
        model.tokenizer.encode(template.render([{"role": "user", "content": question}]), special=False)
        for question in questions
    ]
    longest = max(map(len, prompts))
    workload = Workload(longest + tokens, prompt=longest)
    reports: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    the_plan = model.plan(workload)
    for prompt in prompts:
        texts = set()
        for name, patches in VARIANTS.items():
            with patched(patches), model.engine(the_plan) as engine:
                generation = engine.generate(prompt, tokens, ignore_eos=True)
                texts.add("".join(token.text for token in generation))
            reports[name].append(generation.report.to_json())
        if len(texts) != 1:
            raise SystemExit("the variants wrote different texts")
    return {name: medians(found) for name, found in reports.items()}


VARIANTS: dict[str, dict[str, Any]] = {
    "off": {"flashrt.engine.decode_loop.drafters_of": lambda engine, sampler: []},
    "static": {f"{DRAFTERS}.Lookup": None, f"{RESIDENT}.SWAP_MARGIN": float("inf")},
    "lookup": {f"{DRAFTERS}.ModelDrafter": None},
    "adaptive": {f"{DRAFTERS}.Lookup": None},
    "chain": {f"{MODEL}.WIDTH": 1},
    "all": {},
}


class Silent:
    """A drafter that never proposes anything."""

    name = "silent"

    def __init__(self, *arguments: Any) -> None:
        pass

    def accept(self, tokens: Any) -> None:
        pass

    def propose(self) -> Iterator[list[Any]]:
        return iter(())


@contextlib.contextmanager
def patched(patches: dict[str, Any]) -> Iterator[None]:
    with contextlib.ExitStack() as all_of_them:
        for name, value in patches.items():
            all_of_them.enter_context(mock.patch(name, Silent if value is None else value))
        yield


if __name__ == "__main__":
    main()
