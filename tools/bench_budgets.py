#!/usr/bin/env python3
"""Run a pack under several memory budgets and say how fast, how much was read, and whether the budget held.

    python tools/bench_budgets.py PACK --budgets 0.7 1 1.5 none --tokens 64 --out docs/benchmarks/budgets-NAME.json

Every run is a fresh process inside a memory cgroup of exactly its budget; budgets alternate, and before each run the
disk's rate is measured with plain sequential O_DIRECT reads (one in flight, and eight). Greedy tokens must be the same
under all budgets. 'none' lifts the limit. Medians are quoted; JSON is printed last.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from flashrt import __version__
from flashrt.machine.disk import PLAIN_DEPTH, sequential_rate
from flashrt.machine.process import usable_cores
from flashrt.storage.pack import Pack

try:
    from tools.run_in_cgroup import run_limited
except ImportError:  # run as a script: this folder is on the path instead
    from run_in_cgroup import run_limited  # type: ignore[import-not-found,no-redef]

GIB = 1 << 30
PROMPT = "def quicksort(items):"
NO_LIMIT = 1 << 50
PLAIN_BLOCK = 4 << 20  # bytes of one read of the plain sequential read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--budgets", nargs="+", default=["1", "none"], metavar="GIB", help="GiB, or none")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--cold", action="store_true", help="drop the page cache before each run (needs root)")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {budget: [] for budget in args.budgets}
    for repetition in range(args.repeat):
        for budget, results in runs.items():
            results.append(measure(args, budget))
            print(f"{repetition + 1}/{args.repeat}  {_line(budget, results[-1])}", file=sys.stderr)
    result = summary(args, runs)
    text = json.dumps(result, indent=1)
    if args.out:
        args.out.write_text(text + "\n")
    print(text if args.out is None else json.dumps(result))


def measure(args: argparse.Namespace, budget: str) -> dict[str, Any]:
    """One run: flashrt's own report, and what was seen from outside."""
    largest = Pack(args.pack).largest_file
    plain = sequential_rate(largest, block=PLAIN_BLOCK)
    several = sequential_rate(largest, block=PLAIN_BLOCK, depth=PLAIN_DEPTH)
    if args.cold:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    command = [sys.executable, "-m", "flashrt", "run", str(args.pack), "--json", "--ignore-eos", "--speculate", "off"]
    command += ["--prompt", args.prompt, "--max-new-tokens", str(args.tokens)]
    limit = NO_LIMIT if budget == "none" else int(float(budget) * GIB)
    if budget != "none":
        command += ["--budget-gb", budget]
    began = time.perf_counter()
    outcome = run_limited(command, limit)
    seconds = time.perf_counter() - began
    if outcome.returncode != 0:
        return {"failed": outcome.stderr.strip().splitlines()[-1:], "oom_killed": outcome.oom_killed}
    report = json.loads(outcome.stdout.splitlines()[-1])
    rate = report["disk_bytes_per_s"]
    return report | {
        "wall_s": seconds,
        "cgroup_peak_bytes": outcome.peak_bytes if outcome.limited else None,
        "oom_killed": outcome.oom_killed,
        "disk_plain_bytes_per_s": plain,
        "disk_deep_bytes_per_s": several,
        "share_of_plain": rate / plain if rate else None,
        "share_of_best": rate / max(plain, several) if rate else None,
    }


def summary(args: argparse.Namespace, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians per budget, and whether all budgets gave the same tokens."""
    tokens = {tuple(run["token_ids"]) for results in runs.values() for run in results if "token_ids" in run}
    manifest = Pack(args.pack).manifest
    return {
        "tool": "bench_budgets",
        "command": " ".join(["python", "tools/bench_budgets.py", "PACK", *sys.argv[2:]]),
        "flashrt": __version__,
        "machine": {"platform": platform.platform(), "cores": usable_cores()},
        "model": manifest.name,
        "dtype": manifest.dtype.value,
        "pack_bytes": Pack(args.pack).layout.nbytes,
        "new_tokens": args.tokens,
        "repeat": args.repeat,
        "same_tokens": len(tokens) == 1,
        "budgets": {budget: _medians(budget, results) for budget, results in runs.items()},
    }


FIGURES = (
    "decode_tok_per_s",
    "ttft_s",
    "load_s",
    "wall_s",
    "bytes_read_per_token",
    "io_wait_s",
    "compute_s",
    "disk_bytes_per_s",
    "disk_plain_bytes_per_s",
    "disk_deep_bytes_per_s",
    "share_of_plain",
    "share_of_best",
    "peak_rss_bytes",
    "cgroup_peak_bytes",
)


def _medians(budget: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    good = [run for run in results if "failed" not in run]
    if not good:
        return {"failed": results[0]["failed"], "oom_killed": any(run["oom_killed"] for run in results)}
    figures: dict[str, Any] = {"oom_killed": any(run["oom_killed"] for run in results)}
    for name in FIGURES:
        values = [run[name] for run in good if run[name] is not None]
        figures[name] = statistics.median(values) if values else None
    for name in ("decode_tok_per_s", "wall_s"):
        figures[f"{name}_all"] = [run[name] for run in good]
    if budget != "none":
        figures["budget_used"] = max(run["peak_rss_bytes"] for run in good) / (float(budget) * GIB)
    return figures


def _line(budget: str, run: dict[str, Any]) -> str:
    if "failed" in run:
        return f"{budget:>5} GiB  failed: {run['failed']}"
    share = f"{run['share_of_plain']:.0%} of a plain read" if run["share_of_plain"] else "nothing streamed"
    speed = f"{run['decode_tok_per_s']:6.2f} tok/s" if run["decode_tok_per_s"] else f"{run['wall_s']:.2f} s in all"
    return (
        f"{budget:>5} GiB  {speed}  {run['bytes_read_per_token'] / 1e6:7.1f} MB/token  "
        f"{share}  peak {run['peak_rss_bytes'] / GIB:.3f} GiB"
    )


if __name__ == "__main__":
    main()
