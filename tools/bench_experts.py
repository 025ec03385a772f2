#!/usr/bin/env python3
"""The cache of experts beside experts loaded as they are named, on packs of random weights and on synthetic traces.

    python -m tools.bench_experts FOLDER --preset mixtral-8x7b --budget-gb 8 --out docs/benchmarks/experts-NAME.json

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
Policies are compared on synthetic traces: experts drawn with a Zipf law, kept from token to token with some
probability, the law's order changing now and then. Medians are quoted; JSON is printed last.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from flashrt import __version__
from flashrt.budget.claims.experts import ExpertClaim
from flashrt.budget.process import usable_cores
from flashrt.budget.profile import PLAIN_DEPTH, sequential_rate
from flashrt.cache.experts import ExpertCache, ExpertStream
from flashrt.cache.forecast import Forecast
from flashrt.storage.pack import Pack
from flashrt_kernels.rows import Codec
from tools.make_synthetic_pack import PRESETS, Shape, make
from tools.run_in_cgroup import run_limited

GIB = 1 << 30
PROMPT = "MoE"
PLAIN_BLOCK, PLAIN_BYTES = 4 << 20, 1 << 30  # bytes of a read, and of all, when the disk is measured
WAYS = ("blocks", "no look-ahead", "cache")

Array = np.ndarray


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", choices=[n for n, s in PRESETS.items() if s.experts], default="mixtral-8x7b")
    for field in Shape.__dataclass_fields__:
        parser.add_argument(f"--{field.replace('_', '-')}", type=int, metavar="N", help="in place of the preset's")
    parser.add_argument("--budget-gb", type=float, default=8.0)
    parser.add_argument("--skews", type=float, nargs="+", default=[0.0, 1.5])
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--traced-tokens", type=int, default=600, help="length of the synthetic traces")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--run", choices=WAYS, help=argparse.SUPPRESS)  # the child process of one run
    args = parser.parse_args()
    if args.run:
        print(json.dumps(run(args)))
        return
    given = {field: getattr(args, field) for field in Shape.__dataclass_fields__ if getattr(args, field) is not None}
    shape = replace(PRESETS[args.preset], **given)
    result = about(args, shape)
    result["packs"] = {f"skew {skew:g}": bench(args, shape, skew) for skew in args.skews}
    result["synthetic_traces"] = simulations(shape, slots_of(result["packs"]), args.traced_tokens)
    text = json.dumps(result, indent=1)
    if args.out:
        args.out.write_text(text + "\n")
    print(text if args.out is None else json.dumps(result))


def about(args: argparse.Namespace, shape: Shape) -> dict[str, Any]:
    return {
        "tool": "bench_experts",
        "command": " ".join(["python -m tools.bench_experts FOLDER", *sys.argv[2:]]),
        "flashrt": __version__,
        "machine": {"platform": platform.platform(), "cores": usable_cores()},
        "model": f"random weights in the shape of {args.preset}",
        "shape": asdict(shape),
        "dtype": Codec.INT4.value,
        "budget_gb": args.budget_gb,
        "new_tokens": args.tokens,
        "repeat": args.repeat,
    }


def bench(args: argparse.Namespace, shape: Shape, skew: float) -> dict[str, Any]:
    """All ways in turn on the pack of one skew."""
    path = args.folder / f"{args.preset}-skew-{skew:g}"
    there = (path / "manifest.json").exists()
    if not there:
        print(f"writing {path}", file=sys.stderr)
        make(path, args.preset, shape, Codec.INT4, router_skew=skew)
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    try:
        for repetition in range(args.repeat):
            for way, results in runs.items():
                results.append(measure(args, path, way))
                print(f"{repetition + 1}/{args.repeat}  {_line(way, results[-1])}", file=sys.stderr)
        return summary(path, runs)
    finally:
        if not there:
            shutil.rmtree(path)


def measure(args: argparse.Namespace, path: Path, way: str) -> dict[str, Any]:
    """One run in a process of its own, after the disk was measured."""
    disk = sequential_rate(Pack(path).largest_file, limit=PLAIN_BYTES, block=PLAIN_BLOCK, depth=PLAIN_DEPTH)
    command = [sys.executable, "-m", "tools.bench_experts", str(path), "--run", way]
    command += ["--budget-gb", str(args.budget_gb), "--tokens", str(args.tokens)]
    outcome = run_limited(command, int(args.budget_gb * GIB))
    if outcome.returncode != 0:
        raise SystemExit(f"{way} failed: {outcome.stderr.strip()[-2000:]}")
    report: dict[str, Any] = json.loads(outcome.stdout.splitlines()[-1])
    if report["plan"]["streamed_bytes_per_token"] == 0:
        raise SystemExit(f"{path} fits in {args.budget_gb} GiB: there is nothing to compare")
    return report | {"disk_bytes_per_s": disk, "limited": outcome.limited}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The child's part: flashrt's report of one way, and how many tokens each rank of experts got."""
    import flashrt
    from flashrt.config import Sampling

    if args.run == "blocks":
        ExpertClaim._slots = lambda self, free: 0  # type: ignore[method-assign]
    if args.run == "no look-ahead":
        ExpertCache.looks_ahead = False
    chosen = _recorded()
    with flashrt.load(args.folder, args.budget_gb, context=args.tokens + len(PROMPT)) as engine:
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


FIGURES = ("decode_tok_per_s", "bytes_read_per_token", "io_wait_s", "ttft_s", "load_s", "peak_rss_bytes")


def summary(path: Path, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of each way, and how they compare."""
    everyone = [report for results in runs.values() for report in results]
    ways = {way: _medians(results) for way, results in runs.items()}
    base, cache = ways["blocks"], ways["cache"]
    return {
        "pack_bytes": Pack(path).layout.nbytes,
        "same_tokens": len({tuple(report["token_ids"]) for report in everyone}) == 1,
        "limited": all(report["limited"] for report in everyone),
        "use_by_rank": everyone[0]["use_by_rank"],
        "cache_over_blocks": cache["decode_tok_per_s"] / base["decode_tok_per_s"],
        "bytes_over_blocks": cache["bytes_read_per_token"] / base["bytes_read_per_token"],
        "ways": ways,
    }


def _medians(results: list[dict[str, Any]]) -> dict[str, Any]:
    figures: dict[str, Any] = {name: statistics.median(report[name] for report in results) for name in FIGURES}
    roofs = [report["disk_bytes_per_s"] / report["bytes_read_per_token"] for report in results]
    shares = [report["decode_tok_per_s"] / roof for report, roof in zip(results, roofs, strict=True)]
    figures["disk_bytes_per_s"] = statistics.median(report["disk_bytes_per_s"] for report in results)
    figures["roof_tok_per_s"] = statistics.median(roofs)
    figures["share_of_roof"] = statistics.median(shares)
    figures["decode_tok_per_s_all"] = [report["decode_tok_per_s"] for report in results]
    plan = results[0]["plan"]
    figures["expert_slots"] = plan["expert_slots"]
    figures["planned_bytes_per_token"] = plan["streamed_bytes_per_token"]
    return figures | {"expert_cache": results[-1]["expert_cache"]}


def _line(way: str, report: dict[str, Any]) -> str:
    cached = report["expert_cache"]
    hits = f"  {cached['hit_rate']:.0%} hits" if cached else ""
    ahead = f", {cached['prefetch_accuracy']:.0%} of reads ahead right" if cached and cached["prefetched"] else ""
    return (
        f"{way:<14} {report['decode_tok_per_s']:6.3f} tok/s  {report['bytes_read_per_token'] / 1e6:8.1f} MB/token  "
        f"the disk gave {report['disk_bytes_per_s'] / 1e9:.2f} GB/s{hits}{ahead}"
    )


def slots_of(packs: dict[str, Any]) -> int:
    return int(next(iter(packs.values()))["ways"]["cache"]["expert_slots"])


@dataclass(frozen=True, slots=True)
class Habit:
    """How a synthetic router behaves."""

    zipf: float  # exponent of the law by which experts are drawn
    kept: float  # probability that an expert of the last token is kept
    drift: int  # tokens after which a quarter of the experts change places in the law; 0 for never


HABITS = {
    "all alike": Habit(0.0, 0.0, 0),
    "Zipf 1": Habit(1.0, 0.0, 0),
    "30% kept": Habit(0.0, 0.3, 0),
    "Zipf 0.3, 50% kept": Habit(0.3, 0.5, 0),
    "Zipf 0.6, 30% kept, drift": Habit(0.6, 0.3, 100),
    "Zipf 1, 20% kept, drift": Habit(1.0, 0.2, 50),
}


def simulations(shape: Shape, slots: int, tokens: int) -> dict[str, dict[str, float]]:
    """Hit rates of each policy under each habit, `slots` experts in memory."""
    result = {}
    for name, habit in HABITS.items():
        trace = synthetic_trace(shape, habit, tokens, np.random.default_rng(0))
        result[name] = {
            "forecast": simulate(trace, shape.experts, slots, _forecast(shape)),
            "LRU": simulate(trace, shape.experts, slots, _recency(shape)),
            "LRU per layer": simulate(trace, shape.experts, slots, _recency(shape), per_layer=True),
            "LFU": simulate(trace, shape.experts, slots, _frequency(shape)),
            "LFU per layer": simulate(trace, shape.experts, slots, _frequency(shape), per_layer=True),
            "clairvoyant": simulate(trace, shape.experts, slots, _next_use(trace, shape.experts)),
        }
    return result


def synthetic_trace(shape: Shape, habit: Habit, tokens: int, rng: np.random.Generator) -> Array:
    """Experts chosen, int64 [tokens, layers, k]: Gumbel top-k draws from the law, some of the last token's kept."""
    layers, experts, k = shape.layers, shape.experts, shape.experts_per_token
    law = -habit.zipf * np.log(np.arange(1, experts + 1))
    ranks = np.stack([rng.permutation(experts) for _ in range(layers)])
    trace = np.empty((tokens, layers, k), np.int64)
    for t in range(tokens):
        if habit.drift and t % habit.drift == 0:
            for row in ranks:
                moved = rng.permutation(experts)[: max(experts // 4, 2)]
                row[moved] = row[np.roll(moved, 1)]
        keys = law[ranks] + rng.gumbel(size=(layers, experts))
        if t:
            kept = np.where(rng.random((layers, k)) < habit.kept, np.inf, -np.inf)
            before = np.take_along_axis(keys, trace[t - 1], 1)
            np.put_along_axis(keys, trace[t - 1], np.maximum(before, kept), 1)
        trace[t] = np.argsort(-keys, axis=1)[:, :k]
    return trace


# Told of (token, layer, experts chosen), a policy says what each expert is worth keeping, float64 [layers, experts].
Policy = Callable[[int, int, Array], Array]


def simulate(trace: Array, experts: int, slots: int, policy: Policy, per_layer: bool = False) -> float:
    """Share of hits after the first eighth of a trace; `per_layer` gives up an expert of the same layer."""
    layers = trace.shape[1]
    order = np.arange(experts * layers).reshape(experts, layers).T  # the first expert of every layer, then the second
    present = order < slots
    hits = total = 0
    for t, token in enumerate(trace):
        for layer, chosen in enumerate(token):
            values = policy(t, layer, chosen)
            missing = chosen[~present[layer, chosen]]
            if t >= len(trace) // 8:
                total, hits = total + len(chosen), hits + len(chosen) - len(missing)
            for expert in missing:
                free = present.copy()
                free[layer, chosen] = False
                if per_layer:
                    free[np.arange(layers) != layer] = False
                if free.any():
                    present.flat[np.where(free, values, np.inf).argmin()] = False
                    present[layer, expert] = True
    return hits / total


def _forecast(shape: Shape) -> Policy:
    forecast = Forecast(shape.layers, shape.experts)

    def values(t: int, layer: int, chosen: Array) -> Array:
        forecast.update(layer, chosen[None])
        return forecast.values(layer)

    return values


def _recency(shape: Shape) -> Policy:
    used = np.full((shape.layers, shape.experts), -1.0)

    def values(t: int, layer: int, chosen: Array) -> Array:
        used[layer, chosen] = t * shape.layers + layer
        return used

    return values


def _frequency(shape: Shape) -> Policy:
    counts = np.zeros((shape.layers, shape.experts))

    def values(t: int, layer: int, chosen: Array) -> Array:
        counts[layer, chosen] += 1
        return counts

    return values


def _next_use(trace: Array, experts: int) -> Policy:
    """Belady's: the expert needed latest goes first."""
    tokens, layers, _ = trace.shape
    following = np.full((tokens + 1, layers, experts), float(tokens * layers))  # of (t, layer): uses at t or later
    for t in range(tokens - 1, -1, -1):
        following[t] = following[t + 1]
        for layer in range(layers):
            following[t, layer, trace[t, layer]] = t * layers + layer
    upcoming = following[0].copy()

    def values(t: int, layer: int, chosen: Array) -> Array:
        upcoming[layer] = following[t + 1, layer]
        return -upcoming

    return values


if __name__ == "__main__":
    main()
