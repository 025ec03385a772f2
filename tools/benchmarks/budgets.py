#!/usr/bin/env python3
"""Run a pack under several memory budgets and say how fast, how much was read, and whether the budget held.

    python -m tools.benchmarks.budgets PACK --budgets 0.7 1 1.5 none --cold --out docs/benchmarks/budgets-NAME.json

Every run is a fresh process, without drafts, inside a memory cgroup of exactly its budget ('none': no limit). Budgets
take turns, and before each run the disk's rate is measured with plain sequential O_DIRECT reads (one in flight, and
eight). Greedy tokens must be the same under all budgets.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashrt.storage.pack import Pack
from tools.benchmarks.harness import facts, runs
from tools.benchmarks.harness.disk import plain_rates
from tools.benchmarks.harness.record import Benchmark, say
from tools.benchmarks.harness.samples import Sample, in_turn, tabulated
from tools.benchmarks.prompts import COMPLETION

FIGURES = (
    "decode_tok_per_s", "ttft_s", "load_s", "wall_s", "bytes_read_per_token", "io_wait_s", "compute_s",
    "disk_bytes_per_s", "peak_rss_bytes", "cgroup_peak_bytes", "oom_killed",
)  # fmt: skip
COLUMNS = {
    "decode_tok_per_s": ("tokens/s", "number"),
    "bytes_read_per_token": ("read per token", "MB"),
    "share_of_plain": ("of a plain read", "share"),
    "share_of_best": ("of the better of both", "share"),
    "ttft_s": ("prompt", "s"),
    "wall_s": ("whole process", "s"),
    "peak_rss_bytes": ("peak memory", "bytes"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = Benchmark("tools.benchmarks.budgets", __doc__)
    parser = benchmark.parser
    parser.add_argument("pack", type=Path)
    parser.add_argument("--budgets", nargs="+", default=["1", "none"], metavar="GIB", help="GiB, or none")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--prompt", default=COMPLETION)
    parser.add_argument("--cold", action="store_true", help="drop the page cache before each run (needs root)")
    args = benchmark.parse(arguments)
    samples, texts = [], set()
    for turn in range(args.repeat):
        for budget in in_turn(args.budgets, turn):
            sample, tokens = measure(args, budget)
            samples.append({"budget": budget, "round": turn} | sample)
            texts |= tokens
            say(f"{turn + 1}/{args.repeat}  {line(samples[-1])}")
    parameters = facts.pack(args.pack) | {name: getattr(args, name) for name in ("prompt", "tokens", "repeat", "cold")}
    benchmark.publish(parameters, samples, summary(args.budgets, parameters, samples, len(texts) == 1))


def measure(args: argparse.Namespace, budget: str) -> tuple[Sample, set[tuple[int, ...]]]:
    """One run's figures and its tokens; of a run that failed, its last words and none."""
    disk = plain_rates(Pack(args.pack).largest_file)
    if args.cold:
        runs.drop_page_cache()
    try:
        report = runs.flashrt_run(args.pack, budget, *runs.without_drafts(args.prompt, args.tokens))
    except runs.RunFailed as failure:
        return {"failed": str(failure), "oom_killed": failure.oom_killed}, set()
    rate, plain = report["disk_bytes_per_s"], disk["disk_plain_bytes_per_s"]
    measured = rate and plain  # a pack too small to be measured with gives nothing to compare with
    shares = {
        "share_of_plain": rate / plain if measured else None,
        "share_of_best": rate / max(disk.values()) if measured else None,
        "budget_used": None if budget == "none" else report["peak_rss_bytes"] / runs.limit_of(budget),
    }
    return {name: report[name] for name in FIGURES} | disk | shares, {tuple(report["token_ids"])}


def summary(budgets: list[str], parameters: dict[str, Any], samples: list[Sample], same: bool) -> dict[str, Any]:
    """A row for each budget."""
    in_order = sorted(samples, key=lambda sample: budgets.index(sample["budget"]))
    text = (
        f"{parameters['model']}, {parameters['dtype']}: {parameters['tokens']} tokens without drafts, runs of each: "
        f"{parameters['repeat']}, in turn. The same tokens under every budget: {'yes' if same else 'NO'}."
    )
    failed = [f"At {sample['budget']}: {sample['failed']}." for sample in in_order if "failed" in sample]
    table = tabulated(in_order, {"budget": ("budget", "budget")}, COLUMNS)
    return {"same_tokens": same, "text": [text, *failed], "tables": [table]}


def line(sample: Sample) -> str:
    budget = sample["budget"]
    if "failed" in sample:
        return f"{budget:>5} GiB  {sample['failed']}"
    share = f"{sample['share_of_plain']:.0%} of a plain read" if sample["share_of_plain"] else "nothing streamed"
    speed = f"{sample['decode_tok_per_s']:6.2f} tok/s" if sample["decode_tok_per_s"] else f"{sample['wall_s']:.2f} s"
    return (
        f"{budget:>5} GiB  {speed}  {sample['bytes_read_per_token'] / 1e6:7.1f} MB/token  "
        f"{share}  peak {sample['peak_rss_bytes'] / runs.GIB:.3f} GiB"
    )


if __name__ == "__main__":
    main()
