#!/usr/bin/env python3
"""Which expert to give up: policies of a cache of experts, on synthetic traces.

    python -m tools.research.expert_policies --preset mixtral-8x7b --slots 75

Experts are drawn with a Zipf law and kept from token to token with some probability; the law's order changes now and
then. `forecast` is what flashrt does, `clairvoyant` (Belady's) what no policy can better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from flashrt.cache.forecast import Forecast
from tools.benchmarks.harness.record import Benchmark
from tools.benchmarks.harness.samples import Sample, table
from tools.make_synthetic_pack import PRESETS, Shape

Array = np.ndarray


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = Benchmark("tools.research.expert_policies", __doc__)
    parser = benchmark.parser
    parser.add_argument("--preset", choices=[n for n, s in PRESETS.items() if s.experts], default="mixtral-8x7b")
    parser.add_argument("--slots", type=int, required=True, help="experts that memory has room for, of all layers")
    parser.add_argument("--tokens", type=int, default=600, help="length of the traces")
    args = benchmark.parse(arguments)
    shape = PRESETS[args.preset]
    samples = simulations(shape, args.slots, args.tokens)
    policies = [name for name in samples[0] if name != "habit"]
    columns = ["share of hits on synthetic traces", *((policy, "permille") for policy in policies)]
    tables = [table(columns, [list(sample.values()) for sample in samples])]
    parameters = {"shape": asdict(shape), "slots": args.slots, "tokens": args.tokens}
    benchmark.publish(parameters, samples, {"tables": tables})


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


def simulations(shape: Shape, slots: int, tokens: int) -> list[Sample]:
    """Hit rates of each policy under each habit, `slots` experts in memory."""
    result = []
    for name, habit in HABITS.items():
        trace = synthetic_trace(shape, habit, tokens, np.random.default_rng(0))
        rates = {
            "forecast": simulate(trace, shape.experts, slots, _forecast(shape)),
            "LRU": simulate(trace, shape.experts, slots, _recency(shape)),
            "LRU per layer": simulate(trace, shape.experts, slots, _recency(shape), per_layer=True),
            "LFU": simulate(trace, shape.experts, slots, _frequency(shape)),
            "LFU per layer": simulate(trace, shape.experts, slots, _frequency(shape), per_layer=True),
            "clairvoyant": simulate(trace, shape.experts, slots, _next_use(trace, shape.experts)),
        }
        result.append({"habit": name} | rates)
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
