#!/usr/bin/env python3
"""What each part of sparse mode by row saves: LLM in a Flash's ablation (section 4), on a calibrated pack.

    python -m tools.research.ablation PACK --text-file FILE [--resident 0.5] [--tokens 200] [--out FILE]

The engine decodes the text once, and says which neurons every token asks for. Their reads are then carried out again,
layer by layer, in each of these ways, the memory of all but the first being a share `--resident` of the FFN:

    naive      the whole FFN, every token, in long reads
    resident   the part that is not in memory, likewise
    predictor  of the neurons not in memory, those that are predicted, each by a read of its own
    window     the same, memory being a window of the neurons used last
    order      memory planned as the engine does, neurons in the order that was fitted, neighbours read together
    lookahead  the same, but what is guessed before a layer's attention is read while attention runs

A neuron's rows lie together in all of them, as packs are written that way. Reads go around the page cache. Tokens per
second are those of computing, measured with everything resident, and reading one after the other. In the last step a
wait as long as attention takes stands for it, and is not counted as reading; what guessing takes is.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from flashrt.budget.claims.rows import RowMemory, divide_windows, least_slots
from flashrt.budget.plan import Workload
from flashrt.cache.rows import RowCache
from flashrt.cache.verification import Verifier
from flashrt.calibration.pack_copy import read_bundles
from flashrt.engine.engine import Engine
from flashrt.engine.loaded_pack import LoadedPack
from flashrt.engine.open import sparse_pack
from flashrt.engine.options import LoadOptions
from flashrt.engine.runtime import runtime_for
from flashrt.model.ffn.base import Tokens
from flashrt.model.ffn.lookahead import Lookahead
from flashrt.model.ffn.sparse_rows import RowBlock
from flashrt.storage.cost import CostCurve
from flashrt.storage.meter import Meter
from flashrt.storage.pack import Pack
from flashrt.storage.reader import DEPTH, Reader
from tools.benchmarks.harness import facts
from tools.benchmarks.harness.record import Benchmark, say
from tools.benchmarks.harness.samples import table
from tools.benchmarks.rows import make_cache, pages

WARM_UP = 0.25  # of the tokens: what is not yet in memory then says nothing of the others

Array = np.ndarray
Trace = list[list[Array]]  # of each token and layer, the neurons asked for: int32 ascending


@dataclass(frozen=True, slots=True)
class Step:
    """One way of reading, per token: means over the tokens after the warm-up."""

    name: str
    io_ms: float
    bytes_read: float
    hit_rate: float | None
    tok_per_s: float
    recall: float | None = None  # of the neurons that had to be read, those that were guessed
    precision: float | None = None  # of the neurons that were read for a guess, those that were then asked for


@dataclass(frozen=True, slots=True)
class Foresight:
    """What is guessed before attention, and the median seconds of a guess and of the attention that it runs beside."""

    guessed: Trace
    guess_s: float
    attention_s: float


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = Benchmark("tools.research.ablation", __doc__)
    parser = benchmark.parser
    parser.add_argument("pack", type=Path, help="a pack that is calibrated by row")
    parser.add_argument("--text-file", type=Path, required=True)
    parser.add_argument("--resident", type=float, default=0.5, help="share of the FFN that memory has room for")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--threads", type=int)
    args = benchmark.parse(arguments)
    found, steps = ablate(args.pack, args.text_file.read_text(), args.resident, args.tokens, args.threads)
    settings = {name: getattr(args, name) for name in ("resident", "tokens", "threads")}
    parameters = facts.pack(args.pack) | settings | found
    benchmark.publish(parameters, [asdict(step) for step in steps], summary(parameters, steps))


def summary(parameters: dict[str, Any], steps: Sequence[Step]) -> dict[str, Any]:
    naive, last = steps[0], steps[-1]
    text = (
        f"{parameters['tokens']} tokens, each asking for {parameters['rows_per_token']:,.0f} neurons of feed-forward "
        f"blocks of {parameters['ffn_bytes'] / 2**20:,.0f} MiB in all; from the second line on "
        f"{parameters['resident']:.0%} of them are in memory. The steps are those of `tools/research/ablation.py`. Of "
        f"the neurons that had to be read, {last.recall or 0:.0%} were guessed before attention; of those read for a "
        f"guess, {last.precision or 0:.0%} were used."
    )
    columns = [
        "reading", ("I/O, ms per token", "number"), ("less by", "ratio"), ("read per token", "kB"),
        ("less by", "ratio"), ("in memory", "share"), ("tokens/s", "number"),
    ]  # fmt: skip
    rows = [
        [
            *(step.name, step.io_ms, naive.io_ms / step.io_ms, step.bytes_read),
            *(naive.bytes_read / max(step.bytes_read, 1), step.hit_rate, step.tok_per_s),
        ]
        for step in steps
    ]
    return {"text": [text], "tables": [table(columns, rows)]}


def ablate(
    path: Path, text: str, resident: float, tokens: int, threads: int | None = None
) -> tuple[dict[str, Any], list[Step]]:
    """What the text asks for, and the steps. Raises UsageError when the pack is not calibrated."""
    base = Pack(path)
    ordered = sparse_pack(base)
    trace, sparse_s = decode(ordered.path, text, tokens, threads)
    _, exact_s = decode(path, text, tokens, threads)
    ahead = foresee(ordered.path, text, tokens, threads)
    natural = [order_of(base, ordered, i) for i in range(len(base.spec.layers))]
    plain = [[np.sort(order[rows]) for order, rows in zip(natural, token, strict=True)] for token in trace]
    curve, dense = curve_of(base), [everything(base)] * tokens
    whole, reader, merging = Reader(base, curve=curve), Reader(base), Reader(ordered, curve=curve)
    try:
        steps = [
            measure("naive", row_reads(base, whole, dense, 0.0), whole, exact_s),
            measure("resident", row_reads(base, whole, dense, resident), whole, exact_s),
            measure("predictor", row_reads(base, reader, plain, resident), reader, sparse_s),
            replay("window", plain, windows(base, reader, resident), reader, sparse_s),
            replay("order", trace, planned(ordered, merging, resident), merging, sparse_s),
            replay("lookahead", trace, planned(ordered, merging, resident), merging, sparse_s, ahead),
        ]
    finally:
        for opened in (whole, reader, merging):
            opened.close()
    for step in steps:
        say(f"{step.name:10} {step.io_ms:8.2f} ms {step.bytes_read / 1e6:8.3f} MB {step.tok_per_s:7.1f} tokens/s")
    ffn_bytes = sum(base.layout.tensors[f"{i}.ffn"].nbytes for i in range(len(base.spec.layers)))
    rows_per_token = float(np.mean([sum(map(len, token)) for token in trace]))
    return {"ffn_bytes": ffn_bytes, "rows_per_token": rows_per_token}, steps


def decode(path: Path, text: str, tokens: int, threads: int | None) -> tuple[Trace, float]:
    """What each of the first tokens of a text asks for, and the median seconds of one, with everything resident."""
    trace: Trace = []
    return trace, run_text(path, text, tokens, threads, lambda engine: watch(engine, trace))


def foresee(path: Path, text: str, tokens: int, threads: int | None) -> Foresight:
    """What would be guessed while a text is decoded."""
    guessed: Trace = []
    seconds: list[tuple[float, float]] = []
    run_text(path, text, tokens, threads, lambda engine: watch_guesses(engine, guessed, seconds))
    return Foresight(guessed, *map(statistics.median, zip(*seconds, strict=True)))


def run_text(
    path: Path,
    text: str,
    tokens: int,
    threads: int | None,
    watching: Callable[[Engine], contextlib.AbstractContextManager[Callable[[], None]]],
) -> float:
    """Decode the first tokens of a text with everything resident; the median seconds of one.

    `watching` is entered with the engine, and gives what is called before each token.
    """
    model = LoadedPack(Pack(path), LoadOptions(threads=threads, speculate="off"), runtime_for("cpu", threads))
    ids = model.tokenizer.encode(text)[:tokens]
    if len(ids) < tokens:
        raise SystemExit(f"the text has {len(ids)} tokens, fewer than --tokens {tokens}")
    window = min(tokens, model.spec.context)
    seconds = []
    with model.load(Workload(window, prompt=window)) as engine, watching(engine) as begin:
        for n, token in enumerate(ids):
            if n % window == 0:
                engine.sequence.rewind(0)
            begin()
            began = time.perf_counter()
            engine.runner.step(engine.sequence, token)
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def row_blocks(engine: Engine) -> list[RowBlock]:
    """The blocks of a pack calibrated by row; none of another's."""
    return [block for block in engine.runner.decoder.ffns.blocks if isinstance(block, RowBlock)]


@contextlib.contextmanager
def watch(engine: Engine, trace: Trace) -> Iterator[Callable[[], None]]:
    """Have every layer's predictions noted in the last entry of `trace`; what makes room for another token."""
    for block in row_blocks(engine):
        predict = block.predictor.predict

        def noted(hidden: Array, predict: Callable[[Array], Array] = predict) -> Array:
            rows = predict(hidden)
            trace[-1].append(rows)
            return rows

        block.predictor.predict = noted  # type: ignore[method-assign]
    yield lambda: trace.append([])


@contextlib.contextmanager
def watch_guesses(engine: Engine, trace: Trace, seconds: list[tuple[float, float]]) -> Iterator[Callable[[], None]]:
    """Have guesses made and noted likewise, and the seconds of each guess and of the attention after it."""
    decoder, lookaheads = engine.runner.decoder, [Lookahead(engine.spec.hidden) for _ in engine.spec.layers]
    attention = decoder._mix

    blocks = row_blocks(engine)

    def noted(i: int, tokens: Tokens, *others: Any) -> None:
        began = time.perf_counter()
        normed = np.empty_like(tokens.residual)
        decoder.work.norm(f"{i}.norm.ffn", tokens.residual, normed)
        trace[-1].append(blocks[i].predictor.predict(lookaheads[i].guess(normed)))
        guessed = time.perf_counter()
        attention(i, tokens, *others)
        seconds.append((guessed - began, time.perf_counter() - guessed))

    decoder._mix = noted  # type: ignore[method-assign]

    def learn(kind: str, i: int, residual: Array, values: Array) -> None:
        if kind == "ffn":
            lookaheads[i].learn(values)

    with decoder.observing(learn):
        yield lambda: trace.append([])


def order_of(base: Pack, ordered: Pack, i: int) -> Array:
    """The base pack's neuron at each place of a calibrated pack's layer, found by their bytes."""
    name, neurons = f"{i}.ffn", base.spec.layers[i].ffn.neurons
    places = {bundle.tobytes(): n for n, bundle in enumerate(read_bundles(base, name)[:neurons])}
    return np.array([places[bundle.tobytes()] for bundle in read_bundles(ordered, name)[:neurons]], np.int32)


def curve_of(pack: Pack) -> CostCurve:
    with Meter(pack.largest_file) as meter:
        return CostCurve(meter.curve(DEPTH))


def everything(pack: Pack) -> list[Array]:
    """All neurons of every layer."""
    return [np.arange(layer.ffn.neurons, dtype=np.int32) for layer in pack.spec.layers]


def row_reads(pack: Pack, reader: Reader, trace: Trace, share: float) -> list[Callable[[], None]]:
    """For every token, read the rows that it asks for beyond the leading ones, which are in memory."""
    tensors = [pack.layout.tensors[f"{i}.ffn"] for i in range(len(pack.spec.layers))]
    memory = pages(max(t.nbytes for t in tensors))

    def run(token: Sequence[Array]) -> None:
        for tensor, rows in zip(tensors, token, strict=True):
            absent = rows[rows >= share * tensor.run_bundles].astype(np.int64)
            out = memory[: tensor.nbytes].reshape(-1, tensor.stride)
            offsets = tensor.offset + absent * tensor.stride
            reader.submit_rows(tensor.file, offsets, out, np.arange(len(absent))).wait()

    return [lambda token=token: run(token) for token in trace]  # type: ignore[misc]


def windows(pack: Pack, reader: Reader, share: float) -> list[RowCache]:
    """Caches without pinned rows."""
    tensors = [pack.layout.tensors[f"{i}.ffn"] for i in range(len(pack.spec.layers))]
    return [make_cache(reader, tensor, 0.0, share) for tensor in tensors]


def planned(pack: Pack, reader: Reader, share: float) -> list[RowCache]:
    """Caches that divide the same memory as the planner would, were there no blocks: hot rows and windows."""
    layers = [RowMemory(pack.layout.tensors[f"{i}.ffn"], rows) for i, rows in enumerate(pack.layout.rows)]
    total = share * sum(r.tensor.run_bundles for r in layers)
    spare = max(total - sum(r.wanted for r in layers), 0) / sum(r.tensor.run_bundles for r in layers)
    pinned = {r.tensor.name: int(spare * r.tensor.run_bundles) * r.tensor.stride for r in layers}
    free = int(total * layers[0].tensor.stride) - sum(pinned.values())
    window = divide_windows(layers, pinned, free)
    caches = []
    for r in layers:
        held = pinned[r.tensor.name] // r.tensor.stride
        slots = max(held + window[r.tensor.name], least_slots(r.tensor.run_bundles, held))
        memory = pages(slots * r.tensor.stride).reshape(-1, r.tensor.stride)
        verifier = Verifier(reader, pages(r.tensor.max_block_bytes))
        verifier.check(r.tensor, range(r.tensor.blocks))
        cache = RowCache(reader, verifier, r.tensor, memory, held)
        cache.load()
        caches.append(cache)
    return caches


def replay(
    name: str, trace: Trace, caches: list[RowCache], reader: Reader, compute_s: float, ahead: Foresight | None = None
) -> Step:
    """Bring every token's rows through the caches, after those that were guessed, where they are given."""

    def run(n: int) -> None:
        for i, (cache, rows) in enumerate(zip(caches, trace[n], strict=True)):
            if ahead is not None:
                cache.prefetch(ahead.guessed[n][i])
                wait(ahead.attention_s)
            for _ in cache.ensure(rows):
                pass

    first = int(WARM_UP * len(trace))
    for n in range(first):
        run(n)
    before = counts(caches)
    step = measure(name, [lambda n=n: run(n) for n in range(first, len(trace))], reader, compute_s, 0)  # type: ignore[misc]
    count = counts(caches)
    count.subtract(before)
    read = count["misses"] + count["useful"]
    step = replace(step, hit_rate=1 - read / max(count["asked"], 1))
    if ahead is None:
        return step
    io_s = step.io_ms / 1e3 + len(caches) * (ahead.guess_s - ahead.attention_s)
    return replace(
        step,
        io_ms=1e3 * io_s,
        tok_per_s=1 / (io_s + compute_s),
        recall=count["useful"] / max(read, 1),
        precision=count["useful"] / max(count["prefetched"], 1),
    )


def counts(caches: list[RowCache]) -> Counter[str]:
    """The statistics of all layers."""
    return sum((Counter(asdict(cache.statistics)) for cache in caches), Counter())


def wait(seconds: float) -> None:
    """Keep the processor busy, as computing would."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def measure(
    name: str, runs: Sequence[Callable[[], None]], reader: Reader, compute_s: float, warm_up: float = WARM_UP
) -> Step:
    """Time the reads of one token after the other."""
    runs = runs[int(warm_up * len(runs)) :]
    read, began = reader.bytes_read, time.perf_counter()
    for run in runs:
        run()
    io_s = (time.perf_counter() - began) / len(runs)
    return Step(name, 1e3 * io_s, (reader.bytes_read - read) / len(runs), None, 1 / (io_s + compute_s))


if __name__ == "__main__":
    main()
