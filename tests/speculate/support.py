"""Toy targets whose next token depends on the two before, and drafters good and bad."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from flashrt.config import Sampling
from flashrt.engine.sampling import Sampler
from flashrt.speculate.acceptance import verify
from flashrt.speculate.tree import ROOT, TokenTree

Array = np.ndarray
Planter = Callable[[TokenTree, list[int]], None]  # grows a tree, given the tokens up to its root


def path_to(tree: TokenTree, node: int) -> list[int]:
    """Nodes from the root to `node`, both included."""
    nodes = [node]
    while nodes[-1] != ROOT:
        nodes.append(tree.parents[nodes[-1]])
    return nodes[::-1]


class Target:
    """A random table of logits, float32 [vocab, vocab, vocab], by the last two tokens."""

    def __init__(self, vocab: int, seed: int, spread: float = 2.0) -> None:
        self.vocab = vocab
        self.table = np.random.default_rng(seed).normal(size=(vocab,) * 3).astype(np.float32) * spread

    def logits(self, tokens: Sequence[int]) -> Array:
        return self.table[tokens[-2], tokens[-1]].copy()

    def verify(self, tree: TokenTree, tokens: list[int]) -> Array:
        """Logits of every node, float32 [nodes, vocab]; `tokens` end with the root."""
        paths = [[tree.tokens[node] for node in path_to(tree, node)[1:]] for node in range(len(tree))]
        return np.stack([self.logits(tokens + path) for path in paths])


def plain(target: Target, prompt: list[int], sampling: Sampling, count: int) -> list[int]:
    """Tokens decoded one by one."""
    sampler, tokens = Sampler(sampling, prompt), list(prompt)
    for _ in range(count):
        tokens.append(sampler.choose(target.logits(tokens)))
    return tokens[len(prompt) :]


def speculative(target: Target, prompt: list[int], sampling: Sampling, count: int, plant: Planter) -> list[int]:
    """`count` tokens or a few more, by trees that `plant` grows."""
    sampler, tokens = Sampler(sampling, prompt), list(prompt)
    while len(tokens) < len(prompt) + count:
        tree = TokenTree(tokens[-1])
        plant(tree, tokens)
        tokens += [step.token for step in verify(tree, target.verify(tree, tokens), sampler)]
    return tokens[len(prompt) :]


def random_tree(random: np.random.Generator, nodes: int, vocab: int) -> TokenTree:
    """A tree of up to `nodes` nodes: fewer where the same place draws the same token again."""
    tree = TokenTree(int(random.integers(vocab)))
    for _ in range(nodes - 1):
        tree.add(int(random.integers(len(tree))), int(random.integers(vocab)))
    return tree


def planters(target: Target, seed: int) -> dict[str, Planter]:
    random = np.random.default_rng(seed)

    def nothing(tree: TokenTree, tokens: list[int]) -> None:
        pass

    def anything(tree: TokenTree, tokens: list[int]) -> None:
        for _ in range(15):
            tree.add(int(random.integers(len(tree))), int(random.integers(target.vocab)))

    def ranked(tree: TokenTree, tokens: list[int], ranks: Sequence[int], depth: int, node: int = ROOT) -> None:
        if depth > 0:
            order = np.argsort(-target.logits(tokens), kind="stable")
            for rank in ranks:
                token = int(order[rank])
                ranked(tree, [*tokens, token], ranks, depth - 1, tree.add(node, token))

    return {
        "nothing": nothing,
        "anything": anything,
        "likeliest": lambda tree, tokens: ranked(tree, tokens, [0], 5),
        "least likely": lambda tree, tokens: ranked(tree, tokens, [-1], 5),
        "all but the likeliest": lambda tree, tokens: ranked(tree, tokens, range(1, target.vocab), 2),
        "everything": lambda tree, tokens: ranked(tree, tokens, range(target.vocab), 2),
    }
