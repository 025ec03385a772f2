#!/usr/bin/env python3
"""How often the next token is among those drafted, by the rule that accepts them: why there is only one rule.

    python -m tools.research.acceptance --out docs/benchmarks/acceptance-synthetic.json

Pairs of a target's and a drafter's logits are made up: Gaussian, of a spread that differs from token to token as a
language model's certainty does, the drafter's with noise. The noise is such that the drafter's first choice is the
target's with given probabilities. For one to four tokens drafted side by side (at temperature 0 all rules agree):

match, likeliest   the target draws as it would without a draft, and a drafted token counts if it is the one drawn;
                   drafted are the drafter's likeliest tokens
match, same draw   the same, but the drafter draws too, by the same uniform number, as a sampler in the same state does:
                   drafted are its token and its likeliest others
match, same noise  the same with Gumbel noise, a number for every token of the vocabulary; drafted are the drafter's
                   first tokens under it (Daliri et al. 2024, "Coupling without communication and drafter-invariant
                   speculative decoding")
residual           the drafter draws without replacement; the target takes a drafted token with probability min(1, p/q)
                   or goes on with the residual (Leviathan et al. 2023; Chen et al. 2023; for several tokens
                   Sequoia, Chen et al. 2024, without its switch to drawing evenly once q has run out)

Of a single token that a drafter draws by its own numbers, no rule accepts more than `residual`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from tools.benchmarks.harness.record import Benchmark
from tools.benchmarks.harness.samples import Sample, table

Array = np.ndarray

AGREEMENTS = (0.9, 0.77, 0.65)  # of first choices
TEMPERATURES = (0.5, 0.7, 1.0)
LEAST, MOST = 3.0, 20.0  # spread of the logits: from nearly any token to nearly certainly one


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = Benchmark("tools.research.acceptance", __doc__)
    benchmark.parser.add_argument("--tokens", type=int, default=4000)
    benchmark.parser.add_argument("--vocab", type=int, default=2000)
    benchmark.parser.add_argument("--widths", type=int, nargs="+", default=[1, 2, 4])
    args = benchmark.parse(arguments)
    samples = [s for agreement in AGREEMENTS for s in compare(agreement, args.tokens, args.vocab, args.widths)]
    parameters = {"tokens": args.tokens, "vocab": args.vocab}
    columns = [
        ("first choice right", "share"), "temperature", ("likeliest token", "share"), "rule",
        *((f"{width} drafted", "permille") for width in args.widths),
    ]  # fmt: skip
    keys = ("first_choice_right", "temperature", "likeliest_token", "rule")
    rows = [[*(sample[key] for key in keys), *(sample[f"width {w}"] for w in args.widths)] for sample in samples]
    benchmark.publish(parameters, samples, {"tables": [table(columns, rows)]})


def compare(agreement: float, tokens: int, vocab: int, widths: list[int]) -> Iterator[Sample]:
    """Acceptance of every rule at every temperature, by width."""
    target, draft = pairs(agreement, tokens, vocab)
    for temperature in TEMPERATURES:
        p, q = softmax(target / temperature), softmax(draft / temperature)
        case = {
            "first_choice_right": float((target.argmax(1) == draft.argmax(1)).mean()),
            "temperature": temperature,
            "entropy_nats": float(-(p * np.log(np.maximum(p, 1e-30))).sum(1).mean()),
            "likeliest_token": float(p.max(1).mean()),
        }
        for name, rule in RULES.items():
            yield case | {"rule": name} | {f"width {width}": round(rule(p, q, width), 3) for width in widths}


def pairs(agreement: float, tokens: int, vocab: int) -> tuple[Array, Array]:
    """Logits of target and drafter, float64 [tokens, vocab] each; first choices agree for that share of tokens."""
    random = np.random.default_rng(0)
    spread = random.uniform(LEAST, MOST, (tokens, 1))
    common, noise = random.standard_normal((2, tokens, vocab))
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        enough = (common.argmax(1) == (common + middle * noise).argmax(1)).mean() >= agreement
        low, high = (middle, high) if enough else (low, middle)
    return spread * common, spread * (common + low * noise)


def softmax(logits: Array) -> Array:
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def match_likeliest(p: Array, q: Array, width: int) -> float:
    drafted = np.argsort(-q, axis=1)[:, :width]
    return float(np.take_along_axis(p, drafted, 1).sum(1).mean())


def match_same_draw(p: Array, q: Array, width: int) -> float:
    number = np.random.default_rng(3).random((len(p), 1))
    target, own = ((weights.cumsum(1) > number * weights.sum(1, keepdims=True)).argmax(1) for weights in (p, q))
    order = q.copy()
    order[np.arange(len(q)), own] = np.inf
    drafted = np.argsort(-order, axis=1)[:, :width]
    return float((drafted == target[:, None]).any(1).mean())


def match_same_noise(p: Array, q: Array, width: int) -> float:
    noise = np.random.default_rng(1).gumbel(size=p.shape)
    drawn = (np.log(p) + noise).argmax(1)
    drafted = np.argsort(-(np.log(q) + noise), axis=1)[:, :width]
    return float((drafted == drawn[:, None]).any(1).mean())


def residual(p: Array, q: Array, width: int) -> float:
    """One minus the probability that none of the drafted tokens is taken, drawing the drafted ones."""
    random = np.random.default_rng(2)
    p, q, every = p.copy(), q.copy(), np.arange(len(p))
    refused = np.ones(len(p))
    for _ in range(width):
        drawn = (np.log(np.maximum(q, 1e-300)) + random.gumbel(size=q.shape)).argmax(1)
        refused *= 1 - np.minimum(1, p[every, drawn] / np.maximum(q[every, drawn], 1e-300))
        p = normalized(np.maximum(p - q, 0))
        q[every, drawn] = 0
        q = normalized(q)
    return float(1 - refused.mean())


def normalized(weights: Array) -> Array:
    return weights / np.maximum(weights.sum(1, keepdims=True), 1e-300)


RULES = {
    "match, likeliest": match_likeliest,
    "match, same draw": match_same_draw,
    "match, same noise": match_same_noise,
    "residual": residual,
}


if __name__ == "__main__":
    main()
