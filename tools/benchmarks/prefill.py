#!/usr/bin/env python3
"""Prefill of a long prompt, beside llama.cpp's of the same model and length.

    python -m tools.benchmarks.prefill PACK --tokens 4096 16384 --budget 1.5 --gguf FILE \\
        --out docs/benchmarks/prefill-NAME.json

All take turns, each in a process of its own: flashrt inside a memory cgroup of exactly the budget, llama.cpp without a
limit, with flash attention and without, in each of --ubatch, the sizes of its physical batches. The prompt is the first
tokens of the texts, one behind the other. What is timed ends with the logits of its last token.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from flashrt.budget.plan import Workload
from flashrt.engine.open import open_model
from flashrt.engine.options import LoadOptions
from flashrt.machine.process import peak_resident_bytes, usable_cores
from flashrt_kernels import cpu
from tools.benchmarks.harness import facts, runs
from tools.benchmarks.harness.record import Benchmark, say
from tools.benchmarks.harness.samples import Sample, in_turn, tabulated

TEXTS = [facts.ROOT / "tools" / "texts" / "long" / f"{name}.txt" for name in ("cpp", "prose", "python")]
LLAMA_CPP = Path(__file__).parent / "peers" / "run_llama_cpp_prefill.py"
COLUMNS = {
    "tok_per_s": ("tokens/s", "number"),
    "seconds": ("seconds", "number"),
    "peak_rss_bytes": ("peak memory", "bytes"),
    "cgroup_peak_bytes": ("cgroup's peak", "bytes"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = Benchmark("tools.benchmarks.prefill", __doc__)
    parser = benchmark.parser
    parser.add_argument("pack", type=Path)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384], metavar="N", help="of the prompt")
    parser.add_argument("--budget", default="none", metavar="GIB", help="GiB, or none")
    parser.add_argument("--isa", nargs="+", default=[cpu.isa()], choices=cpu.available_isas(), help="flashrt's kernels")
    parser.add_argument("--gguf", type=Path, help="the same model for llama.cpp; omitted: without it")
    parser.add_argument("--flash-attention", nargs="+", default=["on", "off"], choices=("on", "off"))
    parser.add_argument("--ubatch", type=int, nargs="+", default=[512])
    parser.add_argument("--peers", type=Path, default=facts.ROOT / ".peers", help="what `make peers` made")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--texts", type=Path, nargs="+", default=TEXTS)
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)  # a child's part
    args = benchmark.parse(arguments)
    if args.run:
        print(json.dumps(run(args)))
        return
    samples = measured(args, ways_of(args))
    parameters = facts.pack(args.pack) | {
        name: getattr(args, name) for name in ("tokens", "budget", "threads", "repeat")
    }
    benchmark.publish(parameters, samples, summary(parameters, samples))


def ways_of(args: argparse.Namespace) -> dict[str, list[str]]:
    """Commands of all that take turns, without the prompt's length."""
    texts = ["--texts", *map(str, args.texts), "--threads", str(args.threads)]
    own = [sys.executable, "-m", "tools.benchmarks.prefill", str(args.pack), "--run", "--budget", args.budget, *texts]
    found = {f"flashrt, {isa}": [*own, "--isa", isa] for isa in args.isa}
    if args.gguf:
        peer = [str(args.peers / "llama.cpp" / "bin" / "python"), str(LLAMA_CPP), "--model", str(args.gguf), *texts]
        for attention, ubatch in product(args.flash_attention, args.ubatch):
            options = ["--flash-attention", attention, "--ubatch", str(ubatch)]
            found[f"llama.cpp {' '.join(options)}"] = [*peer, *options]
    return found


def measured(args: argparse.Namespace, ways: dict[str, list[str]]) -> list[Sample]:
    samples = []
    for tokens in args.tokens:
        for turn in range(args.repeat):
            for name in in_turn(list(ways), turn):
                budget = args.budget if name.startswith("flashrt") else "none"
                found, outcome = runs.confined([*ways[name], "--tokens", str(tokens)], budget)
                found |= {"tok_per_s": tokens / found["seconds"]}
                found |= {"cgroup_peak_bytes": outcome.peak_bytes if outcome.limited else None}
                found.setdefault("peak_rss_bytes", outcome.peak_rss_bytes)
                samples.append({"tokens": tokens, "way": name, "round": turn} | found)
                say(f"{tokens} tokens  {turn + 1}/{args.repeat}  {name}  {found['tok_per_s']:.1f} tok/s")
    return samples


def run(args: argparse.Namespace) -> Sample:
    """The child's part: seconds of flashrt's prefill."""
    (count,) = args.tokens
    cpu.force_isa(args.isa[0])
    options = LoadOptions(budget_gb=runs.gib_of(args.budget), threads=args.threads, speculate="off")
    with open_model(args.pack, options).load(Workload(count + 1, prompt=count)) as engine:
        prompt: list[int] = []
        for path in args.texts:
            prompt += engine.tokenizer.encode(path.read_text("utf-8"), special=False)
        if len(prompt) < count:
            raise SystemExit(f"the texts have {len(prompt)} tokens, {count} are wanted")
        began = time.perf_counter()
        engine.runner.prefill(engine.sequence, prompt[:count])
        return {
            "seconds": time.perf_counter() - began,
            "chunk": engine.plan.prefill_chunk,
            "budget_bytes": engine.plan.budget_bytes,
            "peak_rss_bytes": peak_resident_bytes(),
        }


def summary(parameters: dict[str, Any], samples: list[Sample]) -> dict[str, Any]:
    text = (
        f"{parameters['model']}, {parameters['dtype']}: the first tokens of a text, {parameters['repeat']} runs each "
        f"in turn, {parameters['threads']} threads. flashrt's budget is {parameters['budget']}, llama.cpp has no limit."
    )
    ordered = sorted(samples, key=lambda sample: sample["tokens"])
    return {"text": [text], "tables": [tabulated(ordered, {"tokens": "prompt", "way": "by"}, COLUMNS)]}


if __name__ == "__main__":
    main()
