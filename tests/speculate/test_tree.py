"""Trees of tokens against plain lists of paths."""

from __future__ import annotations

import numpy as np
import pytest

from flashrt.speculate.tree import ROOT, TokenTree
from tests.speculate.support import path_to, random_tree


def token_paths(tree: TokenTree) -> list[tuple[int, ...]]:
    return [tuple(tree.tokens[n] for n in path_to(tree, node)) for node in range(len(tree))]


def test_paths_that_begin_alike_share_nodes() -> None:
    tree = TokenTree(7)
    first = tree.add(tree.add(ROOT, 3), 4)
    assert tree.add(ROOT, 3) == 1
    other = tree.add(1, 5)
    assert (tree.tokens, tree.parents, tree.depths) == ([7, 3, 4, 5], [-1, 0, 1, 1], [0, 1, 2, 2])
    assert path_to(tree, other) == [0, 1, 3]
    assert tree.children(1) == [first, other]
    assert tree.child(1, 5) == other
    assert tree.child(1, 9) is None
    assert tree.find([3, 5]) == other
    assert tree.find([5, 3]) is None
    assert tree.find([]) == ROOT


@pytest.mark.parametrize("seed", range(5))
def test_random_trees(seed: int) -> None:
    tree = random_tree(np.random.default_rng(seed), 23, 3)
    paths = token_paths(tree)
    assert len(set(paths)) == len(paths) == len(tree)
    assert tree.depths == [len(path) - 1 for path in paths]
    for node in range(len(tree)):
        assert tree.find(paths[node][1:]) == node
        assert [tree.tokens[at] for at in path_to(tree, node)] == list(paths[node])
        assert tree.children(node) == [n for n, parent in enumerate(tree.parents) if parent == node]


@pytest.mark.parametrize("seed", range(5))
def test_select(seed: int) -> None:
    random = np.random.default_rng(seed)
    tree = random_tree(random, 23, 3)
    wanted = random.permutation(len(tree))[:6].tolist()
    nodes = sorted({n for node in wanted for n in path_to(tree, node)})
    selected = tree.select(nodes)
    assert token_paths(selected) == [token_paths(tree)[node] for node in nodes]
    assert selected.select(range(len(selected))).parents == selected.parents


@pytest.mark.parametrize("nodes", [[], [1], [0, 2]])
def test_what_hangs_in_the_air_is_refused(nodes: list[int]) -> None:
    tree = TokenTree(7)
    tree.add(tree.add(ROOT, 3), 4)
    with pytest.raises(ValueError, match=r"root|parent 1"):
        tree.select(nodes)
