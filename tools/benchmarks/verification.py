#!/usr/bin/env python3
"""What a pass over several positions costs beside a pass over one, while weights stream.

    python -m tools.benchmarks.verification PACK --budgets 0.8 --out docs/benchmarks/verification-NAME.json

After a prompt, passes over 1, 2, 4, 8 and 16 positions take turns in a process that is not confined. Their tokens
are the prompt's, and what they add is taken back.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from flashrt.budget.plan import Workload
from flashrt.engine.open import open_model
from flashrt.engine.options import LoadOptions
from flashrt.storage.pack import Pack
from tools.benchmarks.harness import facts
from tools.benchmarks.harness.disk import disk_label, disk_option, plain_rates, slow_disk
from tools.benchmarks.harness.record import Benchmark
from tools.benchmarks.harness.runs import gib_of, in_child
from tools.benchmarks.harness.samples import Sample, grouped, in_turn, only, ratios, tabulated
from tools.benchmarks.prompts import CODE

POSITIONS = (1, 2, 4, 8, 16)
COLUMNS = {
    "seconds": ("ms", "ms"),
    "wait_s": ("waiting, ms", "ms"),
    "bytes_read": ("read", "MB"),
    "over_one": ("times one position", "ratio"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = Benchmark("tools.benchmarks.verification", __doc__)
    benchmark.parser.add_argument("pack", type=Path)
    benchmark.parser.add_argument("--budgets", nargs="+", default=["0.8"], metavar="GIB")
    benchmark.parser.add_argument("--rounds", type=int, default=15)
    disk_option(benchmark.parser)
    args = benchmark.parse(arguments)
    with slow_disk(args.pack, args.disk_gb_per_s):
        rates = plain_rates(Pack(args.pack).largest_file)
        samples = [s for budget in args.budgets for s in in_child(passes, args.pack, budget, args.rounds)]
    parameters = facts.pack(args.pack) | {"rounds": args.rounds, "disk_gb_per_s": args.disk_gb_per_s} | rates
    text = f"{parameters['model']}, {parameters['dtype']}: {args.rounds} passes of each in turn."
    labels = {"budget": ("budget", "budget"), "positions": "positions"}
    ordered = sorted(samples, key=lambda sample: (args.budgets.index(sample["budget"]), sample["positions"]))
    tables = [tabulated(ordered, labels, COLUMNS)]
    text += f" {disk_label(args.disk_gb_per_s, rates)}"
    benchmark.publish(parameters, samples, {"text": [text], "tables": tables})


def passes(pack: Path, budget: str, rounds: int) -> list[Sample]:
    """Seconds of each pass, those that compute waited, and bytes read."""
    model = open_model(pack, LoadOptions(budget_gb=gib_of(budget), speculate=max(POSITIONS)))
    ids = model.tokenizer.encode(CODE[0])
    workload = Workload(len(ids) + 2 * max(POSITIONS), prompt=len(ids))
    samples = []
    with model.load(workload) as engine:
        engine.runner.prefill(engine.sequence, ids)
        tokens = (ids * max(POSITIONS))[: max(POSITIONS)]
        for turn in range(rounds):
            for count in in_turn(POSITIONS, turn):
                began, waited, read = time.perf_counter(), engine.wait_s, engine.reader.bytes_read
                engine.runner.step_batch(engine.sequence, tokens[:count])
                taken = {
                    "seconds": time.perf_counter() - began,
                    "wait_s": engine.wait_s - waited,
                    "bytes_read": engine.reader.bytes_read - read,
                }
                samples.append({"budget": budget, "positions": count, "round": turn} | taken)
                engine.sequence.rewind(engine.sequence.length - count)
    return beside_one(samples)


def beside_one(samples: list[Sample]) -> list[Sample]:
    """Adds each pass's time over that of the pass of one position in the same round."""
    one = only(samples, positions=1)
    for group in grouped(samples, "positions").values():
        for sample, ratio in zip(group, ratios(group, one, "seconds"), strict=True):
            sample["over_one"] = ratio
    return samples


if __name__ == "__main__":
    main()
