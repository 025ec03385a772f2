#!/usr/bin/env python3
"""Decoding at long contexts that nobody waited for: ways to load a pack, in turn.

    python -m tools.benchmarks.longctx PACK --context 32768 262144 --budget 2 \\
        --a kv=exact --b kv=sparse kv_keep=1/16 --out docs/benchmarks/longctx-NAME.json

A way is options of `flashrt.load`, NAME=VALUE. With --gguf (the same model) llama.cpp takes turns too, with and without
flash attention; `make peers` makes its environment. Every run is a fresh process inside a memory cgroup of exactly the
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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from flashrt.budget.plan import Workload
from flashrt.engine.engine import Engine
from flashrt.engine.open import open_model
from flashrt.engine.options import LoadOptions
from flashrt.errors import FlashrtError
from flashrt.machine.process import peak_resident_bytes, usable_cores
from flashrt.storage.pack import Pack
from tools.benchmarks.harness import facts, runs
from tools.benchmarks.harness.disk import plain_rates
from tools.benchmarks.harness.record import Benchmark, say
from tools.benchmarks.harness.samples import Sample, grouped, in_turn, only, ratios, spread, table, tabulated
from tools.benchmarks.kv_sample import KvSample, fill, record

TEXT = facts.ROOT / "tools" / "texts" / "prose.txt"
SHORT = 64  # tokens of the text that is short
WARM_UP = 2  # steps that are not timed
OWN = ("budget_gb", "context", "speculate", "threads")  # options that the benchmark sets
LLAMA_CPP = Path(__file__).parent / "peers" / "run_llama_cpp_long.py"
COLUMNS = {
    "decode_tok_per_s": ("tokens/s", "number"),
    "step_s": ("ms a token", "ms"),
    "short_step_s": ("after a short text", "ms"),
    "context_s": ("of the context", "ms"),
    "bytes_read_per_token": ("read per token", "MB"),
    "share_of_best": ("of the disk's best", "share"),
    "peak_rss_bytes": ("peak memory", "bytes"),
}


@dataclass(frozen=True, slots=True)
class Way:
    """One of those that take turns; `command` lacks the context."""

    name: str
    options: str
    command: list[str]


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = Benchmark("tools.benchmarks.longctx", __doc__)
    parser = benchmark.parser
    parser.add_argument("pack", type=Path)
    parser.add_argument("--context", type=int, nargs="+", default=[32768], metavar="N", help="tokens held")
    parser.add_argument("--budget", default="none", metavar="GIB", help="GiB, or none")
    parser.add_argument("--a", nargs="*", default=[], metavar="NAME=VALUE", help="one way to load")
    parser.add_argument("--b", nargs="*", metavar="NAME=VALUE", help="the other; omitted: there is only one")
    parser.add_argument("--gguf", type=Path, help="the same model for llama.cpp; omitted: without it")
    parser.add_argument("--peers", type=Path, default=facts.ROOT / ".peers", help="what `make peers` made")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--steps", type=int, default=16, help="tokens to time in each run")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--text", type=Path, default=TEXT, help="whose keys and values fill the context")
    parser.add_argument("--text-tokens", type=int, default=1024, help="of it, from its start")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)  # a child's part: where the text was recorded
    args = benchmark.parse(arguments)
    if args.run:
        print(json.dumps(run(args)))
        return
    for words in (args.a, args.b or []):
        load_options(words, args)
    with tempfile.TemporaryDirectory() as folder:
        runs.in_child(record, args.pack, args.text.read_text("utf-8"), args.text_tokens, Path(folder))
        samples = measured(args, ways_of(args, Path(folder)))
    names = ("context", "a", "b", "budget", "threads", "steps", "repeat", "text_tokens")
    parameters = facts.pack(args.pack) | {name: getattr(args, name) for name in names}
    benchmark.publish(parameters, samples, summary(parameters, samples))


def ways_of(args: argparse.Namespace, recorded: Path) -> list[Way]:
    """All that take turns."""
    shared = ["--threads", str(args.threads), "--steps", str(args.steps)]
    flashrt = [sys.executable, "-m", "tools.benchmarks.longctx", str(args.pack), "--run", str(recorded)]
    flashrt += ["--budget", args.budget, *shared, "--a"]
    found = [
        Way(name, " ".join(words), [*flashrt, *words])
        for name, words in (("a", args.a), ("b", args.b))
        if words is not None
    ]
    if args.gguf:
        llama_cpp = [str(args.peers / "llama.cpp" / "bin" / "python"), str(LLAMA_CPP), "--model", str(args.gguf)]
        llama_cpp += ["--text", str(args.text), "--text-tokens", str(args.text_tokens), *shared]
        for attention in ("on", "off"):
            options = ["--flash-attention", attention]
            found.append(Way(f"llama.cpp, {attention}", f"llama.cpp {' '.join(options)}", [*llama_cpp, *options]))
    return found


def measured(args: argparse.Namespace, ways: list[Way]) -> list[Sample]:
    """All ways in turn, at each context."""
    samples = []
    for context in args.context:
        for turn in range(args.repeat):
            for way in in_turn(ways, turn):
                labels = {"context": context, "way": way.name, "options": way.options, "round": turn}
                samples.append(labels | measure(args, [*way.command, "--context", str(context)]))
                say(f"{context} tokens  {turn + 1}/{args.repeat}  {way.options or 'as it is'}  {line(samples[-1])}")
    return samples


def measure(args: argparse.Namespace, command: list[str]) -> Sample:
    """A run in a process of its own, after the disk was measured."""
    best = max(plain_rates(Pack(args.pack).largest_file).values())
    found, outcome = runs.confined(command, args.budget)
    found.setdefault("peak_rss_bytes", outcome.peak_rss_bytes)
    rate = found.setdefault("bytes_read_per_token", 0.0) * found["decode_tok_per_s"]
    return found | {
        "disk_best_bytes_per_s": best,
        "share_of_best": rate / best if best and rate else None,
        "cgroup_peak_bytes": outcome.peak_bytes if outcome.limited else None,
    }


def run(args: argparse.Namespace) -> Sample:
    """The child's part: seconds and bytes of a token, after a short text and after a long one."""
    (context,), sample = args.context, KvSample(args.run)
    model = open_model(args.pack, load_options(args.a, args))
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


def load_options(words: Sequence[str], args: argparse.Namespace) -> LoadOptions:
    """Options of NAME=VALUE. Ends the benchmark where these are none."""
    known = [field.name for field in fields(LoadOptions) if field.name not in OWN]
    given: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in known:
            raise SystemExit(f"{word!r} is no option, expected NAME=VALUE of {', '.join(known)}")
        given[name] = number(value)
    try:
        return LoadOptions(**given, budget_gb=runs.gib_of(args.budget), threads=args.threads, speculate="off")
    except FlashrtError as error:
        raise SystemExit(f"{' '.join(words)}: {error}") from None


def number(value: str) -> Any:
    """What an option's text says: a number where it is one."""
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def summary(parameters: dict[str, Any], samples: list[Sample]) -> dict[str, Any]:
    """A row for each context and way, and what the others give over the first."""
    text = (
        f"{parameters['model']}, {parameters['dtype']}, budget {parameters['budget']}, {parameters['threads']} "
        f"threads: {parameters['steps']} tokens in each of {parameters['repeat']} runs, in turn. Contexts are filled "
        f"with keys and values of {parameters['text_tokens']} tokens of a text, not prefilled."
    )
    labels = {"context": "context", "options": "options"}
    rows = [
        [*key, *(spread(ratios(ours, theirs, figure)) for figure in ("decode_tok_per_s", "context_s"))]
        for key, ours, theirs in beside_first(samples)
    ]
    columns = [*labels.values(), ("tokens/s, over the first way's", "ratio"), ("cost of the context", "ratio")]
    ordered = sorted(samples, key=lambda sample: (sample["context"], sample["way"]))
    return {"text": [text], "tables": [tabulated(ordered, labels, COLUMNS), table(columns, rows)]}


def beside_first(samples: list[Sample]) -> Iterator[tuple[tuple[Any, ...], list[Sample], list[Sample]]]:
    """(context and options, samples of that way, samples of way a), for all ways but a."""
    for (context, way, options), group in grouped(samples, "context", "way", "options").items():
        if way != "a":
            yield (context, options), group, only(samples, context=context, way="a")


def line(sample: Sample) -> str:
    return (
        f"{sample['decode_tok_per_s']:.2f} tok/s, {1e3 * sample['context_s']:.0f} of {1e3 * sample['step_s']:.0f} ms "
        f"for the context, {sample['bytes_read_per_token'] / 1e6:.1f} MB/token, "
        f"peak {sample['peak_rss_bytes'] / runs.GIB:.3f} GiB"
    )


if __name__ == "__main__":
    main()
