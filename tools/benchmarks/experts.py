#!/usr/bin/env python3
"""The cache of experts beside experts loaded as they are named, on packs of random weights.

    python -m tools.benchmarks.experts FOLDER --preset mixtral-8x7b --budget 8 --out docs/benchmarks/experts-NAME.json

For each skew of the routers (see make_synthetic_pack; 0 uses all experts alike, the worst for a cache) a pack is
written to FOLDER, unless it is there, and removed again if it was not. Every run is a process of its own in a memory
cgroup of the budget; the ways take turns:

blocks         no cache: leading blocks of the experts' tensors are pinned, the others read when a router names them.
               What flashrt did before it had the cache, from the same build: the planner is told that no expert fits
no look-ahead  the cache, but nothing is read before its router names it
cache          as it is

Tokens are drawn with a fixed seed at temperature 1 (a greedy random model repeats itself) and must be the same in all.
The roof is what a way's bytes allow for at the rate of plain reads (several at once) measured just before each run: on
a machine with other work to do, flashrt's own engine may be faster than those.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from flashrt.budget.claims.experts import ExpertClaim
from flashrt.cache.experts import ExpertCache, ExpertStream
from flashrt.storage.pack import Pack
from flashrt_kernels.rows import Codec
from tools.benchmarks.harness import runs
from tools.benchmarks.harness.disk import plain_rates
from tools.benchmarks.harness.record import Benchmark, say
from tools.benchmarks.harness.samples import Sample, grouped, in_turn, only, ratios, spread, table, tabulated
from tools.make_synthetic_pack import PRESETS, Shape, make

PROMPT = "MoE"
PLAIN_BYTES = 1 << 30  # of a reading of the disk: runs read more than memory holds
WAYS = ("blocks", "no look-ahead", "cache")
FIGURES = ("decode_tok_per_s", "bytes_read_per_token", "io_wait_s", "ttft_s", "load_s", "peak_rss_bytes")
COLUMNS = {
    "decode_tok_per_s": ("tokens/s", "number"),
    "bytes_read_per_token": ("read per token", "MB"),
    "planned_bytes_per_token": ("planned", "MB"),
    "roof_tok_per_s": ("by plain reads", "number"),
    "share_of_roof": ("of that", "share"),
    "expert_slots": ("experts in memory", "number"),
    "hit_rate": ("hits", "share"),
    "prefetched": ("read ahead", "number"),
    "prefetch_accuracy": ("and right", "share"),
}

Array = np.ndarray


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = Benchmark("tools.benchmarks.experts", __doc__)
    parser = benchmark.parser
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", choices=[n for n, s in PRESETS.items() if s.experts], default="mixtral-8x7b")
    for field in Shape.__dataclass_fields__:
        parser.add_argument(f"--{field.replace('_', '-')}", type=int, metavar="N", help="in place of the preset's")
    parser.add_argument("--budget", default="8", metavar="GIB")
    parser.add_argument("--skews", type=float, nargs="+", default=[0.0, 1.5])
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--run", choices=WAYS, help=argparse.SUPPRESS)  # the child process of one run
    args = benchmark.parse(arguments)
    if args.run:
        print(json.dumps(run(args)))
        return
    given = {field: getattr(args, field) for field in Shape.__dataclass_fields__ if getattr(args, field) is not None}
    shape = replace(PRESETS[args.preset], **given)
    samples = [{"skew": skew} | sample for skew in args.skews for sample in bench(args, shape, skew)]
    parameters = {
        "model": f"random weights in the shape of {args.preset}",
        "shape": asdict(shape),
        "dtype": Codec.INT4.value,
        "budget_gb": float(args.budget),
        "tokens": args.tokens,
        "repeat": args.repeat,
    }
    benchmark.publish(parameters, samples, summary(parameters, samples))


def bench(args: argparse.Namespace, shape: Shape, skew: float) -> list[Sample]:
    """All ways in turn on the pack of one skew."""
    path = args.folder / f"{args.preset}-skew-{skew:g}"
    there = (path / "manifest.json").exists()
    if not there:
        say(f"writing {path}")
        make(path, args.preset, shape, Codec.INT4, router_skew=skew)
    try:
        samples, texts = [], set()
        for turn in range(args.repeat):
            for way in in_turn(WAYS, turn):
                sample, tokens = measure(args, path, way)
                samples.append({"way": way, "round": turn} | sample)
                texts.add(tokens)
                say(f"{turn + 1}/{args.repeat}  {line(samples[-1])}")
    finally:
        if not there:
            shutil.rmtree(path)
    if len(texts) != 1:
        raise SystemExit(f"the ways drew different tokens on {path.name}")
    return samples


def measure(args: argparse.Namespace, path: Path, way: str) -> tuple[Sample, tuple[int, ...]]:
    """One run in a process of its own, after the disk was measured, and its tokens."""
    disk = plain_rates(Pack(path).largest_file, PLAIN_BYTES)["disk_deep_bytes_per_s"]
    command = [sys.executable, "-m", "tools.benchmarks.experts", str(path), "--run", way]
    report, outcome = runs.confined([*command, "--budget", args.budget, "--tokens", str(args.tokens)], args.budget)
    plan, cached = report["plan"], report["expert_cache"] or {}
    if plan["streamed_bytes_per_token"] == 0:
        raise SystemExit(f"{path.name} fits in {args.budget} GiB: there is nothing to compare")
    roof = disk / report["bytes_read_per_token"]
    sample = {name: report[name] for name in FIGURES} | {
        "limited": outcome.limited,
        "disk_deep_bytes_per_s": disk,
        "roof_tok_per_s": roof,
        "share_of_roof": report["decode_tok_per_s"] / roof,
        "planned_bytes_per_token": plan["streamed_bytes_per_token"],
        "expert_slots": plan["expert_slots"] or None,
        "use_by_rank": report["use_by_rank"],
    }
    return sample | cached, tuple(report["token_ids"])


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The child's part: flashrt's report of one way, and how many tokens each rank of experts got."""
    import flashrt
    from flashrt.config import Sampling

    if args.run == "blocks":
        ExpertClaim._slots = lambda self, free: 0  # type: ignore[method-assign]
    if args.run == "no look-ahead":
        ExpertCache.looks_ahead = False
    chosen = _recorded()
    with flashrt.load(args.folder, float(args.budget), context=args.tokens + len(PROMPT)) as engine:
        generation = engine.generate(PROMPT, args.tokens, Sampling(temperature=1.0, seed=1), ignore_eos=True)
        for _ in generation:
            pass
        experts = engine.spec.layers[0].ffn.experts
    use = np.stack([np.bincount(np.concatenate(named), minlength=experts) for named in chosen.values()])
    by_rank = -np.sort(-use, axis=1).sum(axis=0)
    return generation.report.to_json() | {"use_by_rank": (by_rank / by_rank.sum()).round(4).tolist()}


def _recorded() -> dict[int, list[Array]]:
    """Layer → the experts that its router names from now on."""
    chosen: dict[int, list[Array]] = {}
    for store in (ExpertCache, ExpertStream):
        expect = store.expect

        def recording(self: Any, layer: int, named: Array, expect: Callable[..., None] = expect) -> None:
            chosen.setdefault(layer, []).append(named.ravel())
            expect(self, layer, named)

        store.expect = recording  # type: ignore[method-assign]
    return chosen


def summary(parameters: dict[str, Any], samples: list[Sample]) -> dict[str, Any]:
    """How the ways compare: a table of them, and one of the cache over none."""
    text = [
        f"Synthetic: {parameters['model']}, {parameters['dtype']}, routers random too. {parameters['tokens']} tokens, "
        f"the same from all, in a memory cgroup of {parameters['budget_gb']:g} GiB, runs of each: "
        f"{parameters['repeat']}, in turn. *blocks*: no cache; leading blocks of the experts' tensors are pinned, the "
        "others read once a router names them. *By plain reads*: what a way's bytes allow for at the rate of plain "
        "reads, eight at once, just before the run. The machine's other work slows both, and plain reads more than "
        "flashrt's."
    ]
    over = []
    for (skew,), group in grouped(samples, "skew").items():
        use = ", ".join(f"{share:.0%}" for share in group[0]["use_by_rank"])
        text.append(f"Skew {skew:g}: experts get {use} of the tokens, from the favourite of each layer down.")
        pair = only(group, way="cache"), only(group, way="blocks")
        over.append([skew, *(spread(ratios(*pair, name)) for name in ("decode_tok_per_s", "bytes_read_per_token"))])
    order = [s for (skew,) in grouped(samples, "skew") for way in WAYS for s in only(samples, skew=skew, way=way)]
    ways = tabulated(order, {"skew": "skew", "way": "way"}, COLUMNS)
    columns = ["skew", ("the cache over blocks, tokens/s", "ratio"), ("bytes read", "share")]
    return {"text": text, "tables": [ways, table(columns, over)]}


def line(sample: Sample) -> str:
    hits = "" if sample.get("hit_rate") is None else f"  {sample['hit_rate']:.0%} hits"
    ahead = f", {sample['prefetch_accuracy']:.0%} of reads ahead right" if sample.get("prefetched") else ""
    return (
        f"{sample['way']:<14} {sample['decode_tok_per_s']:6.3f} tok/s  "
        f"{sample['bytes_read_per_token'] / 1e6:8.1f} MB/token  "
        f"the disk gave {sample['disk_deep_bytes_per_s'] / 1e9:.2f} GB/s{hits}{ahead}"
    )


if __name__ == "__main__":
    main()
