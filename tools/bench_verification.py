#!/usr/bin/env python3
"""What a pass over several positions costs beside a pass over one, while weights stream.

    python -m tools.bench_verification PACK --budgets 0.8 --out docs/benchmarks/verification-NAME.json

After a prompt, passes over 1, 2, 4, 8 and 16 positions take turns in a process that is not confined. Their tokens
are the prompt's, and what they add is taken back. Prints JSON last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from flashrt.budget.planner import Workload
from flashrt.engine.build import LoadedPack
from flashrt.engine.runtime import runtime_for
from flashrt.storage.names import default_cache
from tools.machine import facts, in_child
from tools.prompts import CODE
from tools.slow_disk import slow_disk

POSITIONS = (1, 2, 4, 8, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--budgets", nargs="+", default=["0.8"], metavar="GIB")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--disk-gb-per-s", type=float, help="read no faster, whatever the disk can do (needs root)")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    rate = args.disk_gb_per_s
    with slow_disk(args.pack, rate):
        budgets = {budget: in_child(passes, args.pack, budget, args.rounds) for budget in args.budgets}
    limit = ["--disk-gb-per-s", str(rate)] if rate else []
    result = {
        "tool": "bench_verification",
        "command": " ".join(["python -m tools.bench_verification PACK --budgets", *args.budgets, *limit]),
        "pack": args.pack.name,
        "disk_gb_per_s": rate,
        "machine": facts(),
        "budgets": budgets,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def passes(pack: Path, budget: str, rounds: int) -> dict[str, Any]:
    """By number of positions: medians of seconds, of those that compute waited, and of bytes read."""
    prepared = LoadedPack(pack, default_cache(), runtime_for("cpu"), None if budget == "none" else float(budget))
    ids = prepared.tokenizer.encode(CODE[0])
    workload = Workload(len(ids) + 2 * max(POSITIONS), prompt=len(ids), max_draft_tokens=max(POSITIONS))
    found: dict[int, list[tuple[float, float, int]]] = {count: [] for count in POSITIONS}
    with prepared.engine(prepared.plan(workload)) as engine:
        engine.runner.prefill(engine.sequence, ids)
        tokens = (ids * max(POSITIONS))[: max(POSITIONS)]
        for _ in range(rounds):
            for count in POSITIONS:
                began, waited, read = time.perf_counter(), engine.wait_s, engine.reader.bytes_read
                engine.runner.step_batch(engine.sequence, tokens[:count])
                found[count].append(
                    (time.perf_counter() - began, engine.wait_s - waited, engine.reader.bytes_read - read)
                )
                engine.sequence.rewind(engine.sequence.length - count)
    figures = {
        str(count): dict(
            zip(("seconds", "wait_s", "bytes_read"), map(statistics.median, zip(*runs, strict=True)), strict=True)
        )
        for count, runs in found.items()
    }
    return {"passes": figures, "ratio_16": figures["16"]["seconds"] / figures["1"]["seconds"]}


if __name__ == "__main__":
    main()
