#!/usr/bin/env python3
"""Decoding at long contexts that nobody waited for: two ways to load a pack, in turn.

    python -m tools.benchmarks.longctx PACK --contexts 32768 262144 --budget 2 \\
        --a kv=exact --b kv=sparse kv_keep=1/16 --out docs/benchmarks/longctx-NAME.json

A way is options of `flashrt.load`, NAME=VALUE. Every run is a fresh process inside a memory cgroup of exactly the
budget ('none': no limit). It times some tokens after a short text; then it fills the context with keys and values of a
real text (see tools.benchmarks.kv_sample) and times tokens there. What the context costs is the difference of the
medians. Before each run the disk's rate is measured with plain sequential O_DIRECT reads of the pack.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from flashrt.budget.plan import Workload
from flashrt.engine.engine import Engine
from flashrt.engine.open import open_model
from flashrt.engine.options import LoadOptions
from flashrt.errors import FlashrtError
from flashrt.machine.process import peak_resident_bytes
from flashrt.storage.pack import Pack
from tools.benchmarks.harness import facts, runs
from tools.benchmarks.harness.disk import plain_rates
from tools.benchmarks.harness.record import Benchmark, say
from tools.benchmarks.harness.samples import Sample, in_turn, only, ratios, spread, table, tabulated
from tools.benchmarks.kv_sample import KvSample, fill, record

TEXT = facts.ROOT / "tools" / "texts" / "prose.txt"
SHORT = 64  # tokens of the text that is short
WARM_UP = 2  # steps that are not timed
OWN = ("budget_gb", "context", "speculate")  # options that the benchmark sets
COLUMNS = {
    "decode_tok_per_s": ("tokens/s", "number"),
    "step_s": ("ms a token", "ms"),
    "short_step_s": ("after a short text", "ms"),
    "context_s": ("of the context", "ms"),
    "bytes_read_per_token": ("read per token", "MB"),
    "share_of_best": ("of the disk's best", "share"),
    "peak_rss_bytes": ("peak memory", "bytes"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = Benchmark("tools.benchmarks.longctx", __doc__)
    parser = benchmark.parser
    parser.add_argument("pack", type=Path)
    parser.add_argument("--contexts", type=int, nargs="+", default=[32768], metavar="N", help="tokens held")
    parser.add_argument("--budget", default="none", metavar="GIB", help="GiB, or none")
    parser.add_argument("--a", nargs="*", default=[], metavar="NAME=VALUE", help="one way to load")
    parser.add_argument("--b", nargs="*", metavar="NAME=VALUE", help="the other; omitted: there is only one")
    parser.add_argument("--steps", type=int, default=16, help="tokens to time in each run")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--text", type=Path, default=TEXT, help="whose keys and values fill the context")
    parser.add_argument("--text-tokens", type=int, default=1024, help="of it, from its start")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)  # a child's part: where the text was recorded
    args = benchmark.parse(arguments)
    if args.run:
        print(json.dumps(run(args)))
        return
    ways = {way: " ".join(words) for way, words in (("a", args.a), ("b", args.b)) if words is not None}
    for words in ways.values():
        load_options(words.split(), args.budget)
    with tempfile.TemporaryDirectory() as folder:
        runs.in_child(record, args.pack, args.text.read_text("utf-8"), args.text_tokens, Path(folder))
        samples = measured(args, ways, Path(folder))
    names = ("contexts", "budget", "steps", "repeat", "text_tokens")
    parameters = facts.pack(args.pack) | ways | {name: getattr(args, name) for name in names}
    benchmark.publish(parameters, samples, summary(parameters, samples))


def measured(args: argparse.Namespace, ways: dict[str, str], recorded: Path) -> list[Sample]:
    """All ways in turn, at each context."""
    samples = []
    for context in args.contexts:
        for turn in range(args.repeat):
            for way in in_turn(list(ways), turn):
                sample = measure(args, ways[way], context, recorded)
                samples.append({"context": context, "way": way, "options": ways[way], "round": turn} | sample)
                say(f"{context} tokens  {turn + 1}/{args.repeat}  {ways[way] or 'as it is'}  {line(sample)}")
    return samples


def measure(args: argparse.Namespace, words: str, context: int, recorded: Path) -> Sample:
    """A run in a process of its own, after the disk was measured."""
    best = max(plain_rates(Pack(args.pack).largest_file).values())
    command = [sys.executable, "-m", "tools.benchmarks.longctx", str(args.pack), "--run", str(recorded)]
    command += ["--contexts", str(context), "--budget", args.budget, "--steps", str(args.steps), "--a", *words.split()]
    found, outcome = runs.confined(command, args.budget)
    rate = found["bytes_read_per_token"] * found["decode_tok_per_s"]
    return found | {
        "disk_best_bytes_per_s": best,
        "share_of_best": rate / best if best and rate else None,
        "cgroup_peak_bytes": outcome.peak_bytes if outcome.limited else None,
    }


def run(args: argparse.Namespace) -> Sample:
    """The child's part: seconds and bytes of a token, after a short text and after a long one."""
    (context,), sample = args.contexts, KvSample(args.run)
    model = open_model(args.pack, load_options(args.a, args.budget))
    with model.load(Workload(context + WARM_UP + args.steps)) as engine:
        engine.runner.prefill(engine.sequence, sample.tokens[:SHORT])
        short, _ = steps(engine, args.steps)
        began = time.perf_counter()
        fill(engine, sample, context)
        fill_s = time.perf_counter() - began
        long, read = steps(engine, args.steps)
        return {
            "decode_tok_per_s": len(long) / sum(long),
            "step_s": statistics.median(long),
            "short_step_s": statistics.median(short),
            "context_s": statistics.median(long) - statistics.median(short),
            "step_s_all": long,
            "bytes_read_per_token": read / len(long),
            "fill_s": fill_s,
            "budget_bytes": engine.plan.budget_bytes,
            "peak_rss_bytes": peak_resident_bytes(),
        }


def steps(engine: Engine, count: int) -> tuple[list[float], int]:
    """Seconds of each of `count` greedy steps, and the bytes that they read from disk."""
    token, seconds, read = engine.sequence.tokens[-1], [], 0
    for i in range(WARM_UP + count):
        if i == WARM_UP:
            read = engine.bytes_read
        began = time.perf_counter()
        token = int(engine.runner.step(engine.sequence, token).argmax())
        seconds.append(time.perf_counter() - began)
    return seconds[WARM_UP:], engine.bytes_read - read


def load_options(words: Sequence[str], budget: str) -> LoadOptions:
    """Options of NAME=VALUE. Ends the benchmark where these are none."""
    known = [field.name for field in fields(LoadOptions) if field.name not in OWN]
    given: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in known:
            raise SystemExit(f"{word!r} is no option, expected NAME=VALUE of {', '.join(known)}")
        given[name] = _number(value)
    try:
        return LoadOptions(**given, budget_gb=runs.gib_of(budget), speculate="off")
    except FlashrtError as error:
        raise SystemExit(f"{' '.join(words)}: {error}") from None


def _number(value: str) -> Any:
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def summary(parameters: dict[str, Any], samples: list[Sample]) -> dict[str, Any]:
    """A row for each context and way, and what one way gives over the other."""
    text = (
        f"{parameters['model']}, {parameters['dtype']}, budget {parameters['budget']}: {parameters['steps']} tokens in "
        f"each of {parameters['repeat']} runs, in turn. Contexts are filled with keys and values of "
        f"{parameters['text_tokens']} tokens of a text, not prefilled."
    )
    ordered = sorted(samples, key=lambda sample: (sample["context"], sample["way"]))
    tables = [tabulated(ordered, {"context": "context", "options": "options"}, COLUMNS)]
    if "b" in parameters:
        columns = ["context", ("tokens/s, b over a", "ratio"), ("cost of the context, a over b", "ratio")]
        tables.append(table(columns, [[n, *over(only(samples, context=n))] for n in parameters["contexts"]]))
    return {"text": [text], "tables": tables}


def over(samples: list[Sample]) -> list[Any]:
    a, b = (only(samples, way=way) for way in ("a", "b"))
    return [spread(ratios(b, a, "decode_tok_per_s")), spread(ratios(a, b, "context_s"))]


def line(sample: Sample) -> str:
    return (
        f"{sample['decode_tok_per_s']:.2f} tok/s, {1e3 * sample['context_s']:.0f} of {1e3 * sample['step_s']:.0f} ms "
        f"for the context, {sample['bytes_read_per_token'] / 1e6:.1f} MB/token, "
        f"peak {sample['peak_rss_bytes'] / runs.GIB:.3f} GiB"
    )


if __name__ == "__main__":
    main()
