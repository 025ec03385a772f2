#!/usr/bin/env python3
"""What cache and guesses save where keys and values are chosen on disk: sparse attention's ablation.

    python -m tools.research.cells PACK --context 262144 --budget-gb 2 --load rope_scaling=yarn:8 --out FILE

One engine decodes behind a context that nobody waited for (see tools.benchmarks.kv_sample), some tokens in each of
these ways, in turn:

    as it is        a guess one layer ahead where that pays, and a cache that gives up what is wanted last
    always guess    in every layer
    never guess     what is missing is read when it is wanted
    heads at once   all KV heads choose, then all is read: nothing is read while another head chooses or is computed
    LRU             without guesses; what was unused for longest is given up
    no cache        without guesses; nothing stays from one token to the next

Shares are of the cells that tokens chose on disk: cached, or read ahead. Recall is the share read ahead of those that
memory did not hold.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flashrt.budget.plan import Workload
from flashrt.engine.engine import Engine
from flashrt.engine.open import open_model
from flashrt.engine.options import LoadOptions
from flashrt.kv.cell_cache import CellCache
from flashrt.kv.chosen import ChosenStore
from flashrt.kv.figures import kv_figures
from flashrt.kv.guesses import Guesses
from flashrt.kv.sparse import ChoosingStore
from tools.benchmarks.harness import facts, runs
from tools.benchmarks.harness.record import Benchmark, say
from tools.benchmarks.harness.samples import Sample, grouped, in_turn, spread, table
from tools.benchmarks.kv_sample import KvSample, fill, record
from tools.benchmarks.longctx import TEXT, number

WARM_UP = 4  # tokens that are not counted after a change of ways
Way = tuple[str, Callable[[], contextlib.AbstractContextManager[Any]]]


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = Benchmark("tools.research.cells", __doc__)
    parser = benchmark.parser
    parser.add_argument("pack", type=Path)
    parser.add_argument("--context", type=int, default=65536, metavar="N", help="tokens held")
    parser.add_argument("--budget-gb", type=float, required=True)
    parser.add_argument("--keep", default="1/16", help="the share of tokens attended to")
    parser.add_argument("--load", nargs="*", default=[], metavar="NAME=VALUE", help="other options of flashrt.load")
    parser.add_argument("--steps", type=int, default=12, help="tokens counted in each turn of a way")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--text", type=Path, default=TEXT, help="whose keys and values fill the context")
    parser.add_argument("--text-tokens", type=int, default=1024, help="of it, from its start")
    benchmark.parser.add_argument(
        "--ways", nargs="+", choices=[name for name, _ in WAYS], default=[name for name, _ in WAYS]
    )
    args = benchmark.parse(arguments)
    given: dict[str, Any] = {name: number(value) for name, _, value in (word.partition("=") for word in args.load)}
    options = LoadOptions(kv="sparse", kv_keep=args.keep, budget_gb=args.budget_gb, speculate="off", **given)
    ways = [way for way in WAYS if way[0] in args.ways]
    tokens = (WARM_UP + args.steps) * args.repeat * len(ways)
    with tempfile.TemporaryDirectory() as folder:
        runs.in_child(record, args.pack, args.text.read_text("utf-8"), args.text_tokens, Path(folder))
        with open_model(args.pack, options).load(Workload(args.context + tokens + 1)) as engine:
            if not engine.plan.kv_cells:
                raise SystemExit("the budget holds all keys and values: there is nothing to choose on disk")
            fill(engine, KvSample(Path(folder)), args.context)
            decoding = Decoding(engine)
            samples = [
                {"way": way[0], "round": turn} | measured(decoding, way, args.steps)
                for turn in range(args.repeat)
                for way in in_turn(ways, turn)
            ]
            figures = {"plan": engine.plan.to_json()}
    names = ("context", "budget_gb", "keep", "load", "steps", "repeat", "text_tokens")
    parameters = facts.pack(args.pack) | {name: getattr(args, name) for name in names} | figures
    benchmark.publish(parameters, samples, summary(parameters, samples))


def measured(decoding: Decoding, way: Way, steps: int) -> Sample:
    """Seconds and figures of a token, computed in one way."""
    (name, changed), engine = way, decoding.engine
    with changed():
        decoding.go_on(WARM_UP)
        before, wait_s, began = engine.kv_counts(), engine.wait_s, time.perf_counter()
        decoding.go_on(steps)
        seconds = time.perf_counter() - began
    counts = Counter({name: count - before[name] for name, count in engine.kv_counts().items()})
    found = {"token_s": seconds / steps, "wait_s": (engine.wait_s - wait_s) / steps} | kv_figures(counts)
    found["bytes_read"] /= steps
    say(f"{name}: {1e3 * found['token_s']:.0f} ms a token, {1e3 * found['wait_s']:.0f} ms of it waiting")
    return found


class Decoding:
    """Greedy decoding from where the engine's sequence ends."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self._token = engine, engine.sequence.tokens[-1]

    def go_on(self, count: int) -> None:
        """Decode so many tokens."""
        for _ in range(count):
            self._token = int(self.engine.runner.step(self.engine.sequence, self._token).argmax())


@contextlib.contextmanager
def _replaced(owner: type, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _guessing(wanted: bool) -> contextlib.AbstractContextManager[None]:
    return _replaced(Guesses, "wanted", lambda guesses: wanted)


@contextlib.contextmanager
def _least_recently_used() -> Iterator[None]:
    with _guessing(False), _replaced(CellCache, "_delay", lambda cache, age: age.copy()):
        yield


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    want = CellCache._want

    def forgetting(cache: CellCache, layer: int, cells: np.ndarray) -> Any:
        slots = cache._slot[layer, cells]
        cache._forget(slots[slots >= 0])
        return want(cache, layer, cells)

    with _guessing(False), _replaced(CellCache, "_want", forgetting):
        yield


WAYS: list[Way] = [
    ("as it is", contextlib.nullcontext),
    ("always guess", lambda: _guessing(True)),
    ("never guess", lambda: _guessing(False)),
    ("heads at once", lambda: _replaced(ChosenStore, "_attend_few", ChoosingStore._attend_few)),
    ("LRU", _least_recently_used),
    ("no cache", _without_cache),
]


def summary(parameters: dict[str, Any], samples: list[Sample]) -> dict[str, Any]:
    """A row for each way."""
    plan = parameters["plan"]
    chosen, cached = plan["kv_cell_bytes_per_token"], plan["kv_cells"] * plan["kv_cell_bytes"]
    text = (
        f"{parameters['model']}, {parameters['dtype']}, {parameters['context']} tokens, {parameters['budget_gb']} GiB, "
        f"{parameters['keep']} attended to: a token chooses {chosen / 1e6:.0f} MB on disk, the cache has "
        f"{cached / 1e6:.0f} MB. {parameters['steps']} tokens in each of {parameters['repeat']} turns."
    )
    columns = [
        "way",
        ("ms a token", "ms"),
        ("waiting", "ms"),
        ("read per token", "MB"),
        ("cached", "share"),
        ("read ahead", "share"),
        ("recall", "share"),
    ]
    figures = ("token_s", "wait_s", "bytes_read", "cached", "read_ahead", "lookahead_recall")
    rows = [
        [name, *(spread([s[figure] for s in samples if s["way"] == name]) for figure in figures)]
        for (name,) in grouped(samples, "way")
    ]
    return {"text": [text], "tables": [table(columns, rows)]}


if __name__ == "__main__":
    main()
