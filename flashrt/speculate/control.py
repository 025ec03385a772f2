"""How much to draft, and what of it to verify: whatever gives the most tokens per second.

A pass brings one token, and one more for each drafted node that stands. With nodes that stand with known probability,
the best tree of n nodes are the n likeliest: a node is never likelier than its parent, so they hang together. Trying
every n is then exact for any costs. (Sequoia, Chen et al. 2024, section 3.1, finds the best shape by dynamic
programming when probabilities depend on ranks alone; the same nodes come out.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

FREE = 1e-3  # of a pass: drafting that takes less is always done


class Size(NamedTuple):
    positions: int
    rate: float  # expected tokens per second


def best_size(chances: Sequence[float], pass_seconds: Sequence[float], spent: float) -> Size:
    """How many of the likeliest nodes to verify; the smallest number of those equally good.

    `chances` are the probabilities that nodes stand, the root's (1) included; `pass_seconds` the seconds of a pass over
    1, 2, .. positions; `spent` the seconds already gone into drafting.
    """
    tokens, best = 0.0, Size(1, 0.0)
    for positions, (chance, seconds) in enumerate(zip(sorted(chances, reverse=True), pass_seconds, strict=False), 1):
        tokens += chance
        rate = tokens / (spent + seconds)
        if rate > best.rate:
            best = Size(positions, rate)
    return best


def best_nodes(chances: Sequence[float], pass_seconds: Sequence[float], spent: float) -> list[int]:
    """The nodes to verify, ascending; the root alone where a draft does not pay. See `best_size`.

    Of nodes equally likely the first are taken, so that parents come with their children.
    """
    positions = best_size(chances, pass_seconds, spent).positions
    likeliest = sorted(range(len(chances)), key=lambda node: -chances[node])
    return sorted(likeliest[:positions])


def worth_a_step(
    chances: Sequence[float], gains: Sequence[float], step_seconds: float, pass_seconds: Sequence[float], spent: float
) -> bool:
    """Whether another draft step, or several, will raise the rate.

    `gains` are the tokens that each further step is expected to add, as if one node of it carried them all. A first
    step may pay only together with others, where a second position costs much and a third little: so all are tried.
    """
    if step_seconds < FREE * pass_seconds[0]:
        return bool(gains)
    now = best_size(chances, pass_seconds, spent).rate
    return any(
        best_size([*chances, *gains[:steps]], pass_seconds, spent + steps * step_seconds).rate > now
        for steps in range(1, len(gains) + 1)
    )
