"""Sizes and shapes against exhaustive search, and against Sequoia's dynamic programming."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest

from flashrt.speculate.control import best_nodes, best_size, worth_a_step
from flashrt.speculate.tree import TokenTree
from tests.speculate.support import random_tree


def chances_of(tree: TokenTree, likely: np.ndarray) -> list[float]:
    chances = [1.0]
    for node, parent in enumerate(tree.parents[1:], start=1):
        chances.append(chances[parent] * float(likely[node]))
    return chances


def every_part(tree: TokenTree) -> list[list[int]]:
    """All sets of nodes with the root that hang together."""
    others = range(1, len(tree))
    sets = (set(chosen) | {0} for n in range(len(tree)) for chosen in itertools.combinations(others, n))
    return [sorted(nodes) for nodes in sets if all(tree.parents[n] in nodes for n in nodes - {0})]


@pytest.mark.parametrize("seed", range(40))
def test_against_every_tree(seed: int) -> None:
    random = np.random.default_rng(seed)
    tree = random_tree(random, 10, 4)
    chances = chances_of(tree, random.random(len(tree)) ** 0.5)
    pass_seconds, spent = (random.random(7) + 0.2).tolist(), float(random.random())

    def rate(nodes: list[int]) -> float:
        return sum(chances[n] for n in nodes) / (spent + pass_seconds[len(nodes) - 1])

    nodes = best_nodes(chances, pass_seconds, spent)
    assert rate(nodes) == pytest.approx(max(rate(n) for n in every_part(tree) if len(n) <= 7))
    assert best_size(chances, pass_seconds, spent).rate == pytest.approx(rate(nodes))
    tree.select(nodes)


def sequoia(accepted: tuple[float, ...], size: int) -> float:
    """Expected tokens of the best tree of `size` nodes, the root included, when the child of a rank stands so often."""

    @functools.cache
    def subtree(nodes: int) -> float:
        return 1 + forest(nodes - 1, 0)

    @functools.cache
    def forest(nodes: int, rank: int) -> float:
        if nodes == 0 or rank == len(accepted):
            return 0.0
        with_rank = [accepted[rank] * subtree(n) + forest(nodes - n, rank + 1) for n in range(1, nodes + 1)]
        return max([forest(nodes, rank + 1), *with_rank])

    return subtree(size)


@pytest.mark.parametrize("accepted", [(0.9, 0.05), (0.6, 0.2, 0.1), (0.4, 0.3, 0.2)])
@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_against_dynamic_programming(accepted: tuple[float, ...], size: int) -> None:
    chances = [1.0]
    grown = [1.0]
    for _ in range(size):
        grown = [chance * share for chance in grown for share in accepted]
        chances += grown
        grown = sorted(grown, reverse=True)[:64]
    free = [1.0] * size
    assert sum(chances[n] for n in best_nodes(chances, free, 0.0)) == pytest.approx(sequoia(accepted, size))


def test_nothing_is_verified_where_it_does_not_pay() -> None:
    chances = [1.0, 0.6, 0.36, 0.3]
    assert best_nodes(chances, [1.0, 2.0, 3.0, 4.0], 0.0) == [0]
    assert best_nodes(chances, [1.0, 1.0, 1.0, 1.0], 0.0) == [0, 1, 2, 3]
    assert best_nodes(chances, [1.0, 1.1, 1.2, 2.4], 0.0) == [0, 1, 2]
    assert best_nodes(chances, [1.0, 1.6], 0.0) == [0], "1.6 tokens in 1.6 seconds are no gain"
    assert best_nodes(chances, [1.0, 1.61], 5.0) == [0, 1], "seconds already spent are to be spread over more tokens"


def test_another_step_pays_while_its_gain_is_worth_its_time() -> None:
    flat = [1.0] * 16
    assert worth_a_step([1.0], [0.8], 0.5, flat, 0.0)
    assert not worth_a_step([1.0], [0.4], 0.5, flat, 0.0)
    assert not worth_a_step([1.0, 0.8, 0.6], [0.4], 0.5, flat, 0.0), "2.4 tokens in 1 s are better than 2.8 in 1.5 s"
    assert worth_a_step([1.0], [0.01], 0.0, [1.0, 9.0], 0.0), "what costs nothing is always asked"
    assert not worth_a_step([1.0], [], 0.0, flat, 0.0)


def test_steps_that_pay_together_are_taken() -> None:
    costly_second = [1.0, 1.6, 1.6, 1.6]
    assert not worth_a_step([1.0], [0.55], 0.01, costly_second, 0.0)
    assert worth_a_step([1.0], [0.55, 0.4, 0.3], 0.01, costly_second, 0.0)
