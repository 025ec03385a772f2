#!/usr/bin/env python3
"""Row cache and predictor of one layer: what a token costs beside the reads, and what of the reads was useful.

    python -m tools.benchmarks.rows PACK [--active 0.1] [--pinned 0.05] [--slots 0.25] [--tokens 400] [--out FILE]

Tokens ask for a random share `--active` of the neurons: low ones more often, as after ordering by frequency, and most
of them again at the next token, as text does. The trace is made up, so hit rates say nothing of a model; times of the
index and of the disk do. The predictor has random factors of rank `--rank`.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from flashrt.budget.claims.rows import least_slots
from flashrt.cache.rows import RowCache
from flashrt.cache.verification import Verifier
from flashrt.model.predictors.low_rank import LowRank, encode
from flashrt.storage.cost import CostCurve
from flashrt.storage.layout import TensorLayout
from flashrt.storage.meter import Meter
from flashrt.storage.pack import Pack
from flashrt.storage.reader import DEPTH, Reader
from flashrt_kernels import cpu
from tools.benchmarks.harness import facts
from tools.benchmarks.harness.record import Benchmark, say
from tools.benchmarks.harness.samples import Sample, table, tabulated, timed

SKEW = 0.8  # a neuron's frequency falls with its rank to this power
KEPT = 0.6  # of a token's neurons, the share that the next one asks for as well
PREDICTIONS = 200
COLUMNS = {"seconds": ("µs", "µs"), "processor_s": ("of its processor", "µs")}

Array = np.ndarray


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = Benchmark("tools.benchmarks.rows", __doc__)
    parser = benchmark.parser
    parser.add_argument("pack", type=Path)
    parser.add_argument("--layer", type=int, default=0)
    parser.add_argument("--active", type=float, default=0.1, help="share of the neurons that a token asks for")
    parser.add_argument("--pinned", type=float, default=0.05, help="share of the neurons")
    parser.add_argument("--slots", type=float, default=0.25, help="share of the neurons, the pinned ones included")
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--rank", type=int, default=128)
    args = benchmark.parse(arguments)
    pack = Pack(args.pack)
    tensor = pack.layout.tensors[f"{args.layer}.ffn"]
    with Meter(pack.path / tensor.file) as meter:
        curve = CostCurve(meter.curve(DEPTH))
    reader = Reader(pack, curve=curve)
    try:
        cache = make_cache(reader, tensor, args.pinned, args.slots)
        samples, counts = time_cache(cache, list(trace(tensor.run_bundles, args.active, args.tokens)))
    finally:
        reader.close()
    predictions, predictor_bytes = time_predictor(pack.spec.hidden, tensor.run_bundles, args.rank)
    settings = {name: getattr(args, name) for name in ("layer", "active", "pinned", "tokens", "rank")}
    parameters = (
        facts.pack(args.pack)
        | settings
        | {
            "neurons": tensor.run_bundles,
            "row_bytes": tensor.stride,
            "slots": len(cache.memory),
            "predictor_bytes": predictor_bytes,
        }
    )
    timings = tabulated(samples + predictions, {"part": "part"}, COLUMNS)
    of_rows = table(["rows", ("count", "number")], [list(count) for count in counts.items()])
    benchmark.publish(parameters, samples + predictions, {"counts": counts, "tables": [timings, of_rows]})


def make_cache(reader: Reader, tensor: TensorLayout, pinned: float, slots: float) -> RowCache:
    """A loaded cache, every block of which has been checked, so that tokens read nothing but rows."""
    neurons = tensor.run_bundles
    held = int(pinned * neurons)
    memory = pages(max(int(slots * neurons), least_slots(neurons, held)) * tensor.stride).reshape(-1, tensor.stride)
    verifier = Verifier(reader, pages(tensor.max_block_bytes))
    verifier.check(tensor, range(tensor.blocks))
    cache = RowCache(reader, verifier, tensor, memory, held)
    cache.load()
    return cache


def pages(nbytes: int) -> Array:
    return np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)


def trace(neurons: int, active: float, tokens: int) -> Iterator[Array]:
    """Rows of one token after the other, int32 ascending."""
    draw = np.random.default_rng(0)
    share = np.arange(1, neurons + 1) ** -SKEW
    count = int(active * neurons)
    rows = draw.choice(neurons, count, replace=False, p=share / share.sum())
    for _ in range(tokens):
        kept = rows[draw.random(count) < KEPT]
        odds = np.delete(share, kept)
        fresh = draw.choice(np.delete(np.arange(neurons), kept), count - len(kept), replace=False, p=odds / odds.sum())
        rows = np.concatenate((kept, fresh))
        yield np.sort(rows).astype(np.int32)


def time_cache(cache: RowCache, tokens: list[Array]) -> tuple[list[Sample], dict[str, float]]:
    """Seconds of `ensure`, on the clock and of its processor, and its counts, over half of the trace."""
    for rows in tokens[: len(tokens) // 2]:
        bring(cache, rows)
    before, samples = asdict(cache.statistics), []
    for token, rows in enumerate(tokens[len(tokens) // 2 :]):
        began = time.thread_time()
        whole = timed(lambda rows=rows: bring(cache, rows))
        own = time.thread_time() - began
        samples.append({"part": "ensure", "token": token, "seconds": whole, "processor_s": own})
    cache.check_integrity()
    counts = {name: value - before[name] for name, value in asdict(cache.statistics).items()}
    found = counts["pinned_hits"] + counts["hits"]
    say(f"rows: {100 * found / counts['asked']:.0f}% found, {counts['misses'] / len(samples):.0f} read per token")
    return samples, counts | {"useful": counts["bytes_wanted"] / max(counts["bytes_read"], 1)}


def bring(cache: RowCache, rows: Array) -> None:
    for _ in cache.ensure(rows):
        pass


def time_predictor(hidden: int, neurons: int, rank: int) -> tuple[list[Sample], int]:
    """Seconds of predictions for one token each, and the bytes of the predictor."""
    draw = np.random.default_rng(0)
    down, up = (draw.standard_normal(shape, np.float32) for shape in ((rank, hidden), (neurons, rank)))
    predictor = LowRank(cpu, encode(cpu, down), encode(cpu, up), np.full(neurons, -1e3, np.float32), rank, 1)
    x = draw.standard_normal((1, hidden), np.float32)
    samples = [
        {"part": "predict", "token": token, "seconds": timed(lambda: predictor.predict(x))}
        for token in range(PREDICTIONS)
    ]
    return samples, predictor.nbytes


if __name__ == "__main__":
    main()
