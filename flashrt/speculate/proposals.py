"""What all drafters propose for one pass, merged into one tree, and how likely each of its nodes is to stand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from flashrt.speculate.accuracy import Accuracy, Promise
from flashrt.speculate.drafter import Candidate
from flashrt.speculate.tree import ROOT, TokenTree

STEP = -1  # the rank in a promise that some candidate of a step is right
STEP_CONFIDENCE = 0.8  # of such promises: what is thought of a drafter that was never tried


class Proposals:
    """Candidates for what follows the token `root`, judged by `accuracy`.

    A token that several drafters propose for the same place is as likely as the one who is surest of it thinks.
    """

    def __init__(self, root: int, accuracy: Accuracy) -> None:
        self.tree = TokenTree(root)
        self._accuracy = accuracy
        self._promises: list[list[Promise]] = [[]]  # about each node
        self._likely = [1.0]  # that a node stands if its parent does

    def add(self, drafter: str, candidates: Iterable[Candidate]) -> list[int]:
        """Take in one step's candidates; returns its frontier: the node of the first, which the next step continues.

        Raises ValueError for a path whose beginning nobody proposed.
        """
        return [self._add(drafter, candidate) for candidate in candidates][:1]

    def chances(self) -> list[float]:
        """The probability that each node stands; the root's is 1."""
        chances = [1.0]
        for parent, likely in zip(self.tree.parents[1:], self._likely[1:], strict=True):
            chances.append(chances[parent] * likely)
        return chances

    def outlook(self, drafter: str, frontier: Sequence[int], limit: int) -> list[float]:
        """Tokens that each of a drafter's next steps, `limit` at most, is expected to add beyond the nodes `frontier`.

        The frontier is what the last step brought, or the root.
        """
        chances = self.chances()
        reached, depth = sum(chances[node] for node in frontier), max(self.tree.depths[node] for node in frontier)
        gains = []
        for deeper in range(depth + 1, limit + 1):
            reached *= self._accuracy.estimate(_step_promise(drafter, deeper))
            gains.append(reached)
        return gains

    def learn(self, tokens: Iterable[int]) -> None:
        """`tokens` followed the root: every candidate whose place was reached is now known to be right or wrong."""
        node: int | None = ROOT
        for token in tokens:
            if node is None:
                break
            self._judge(node, token)
            node = self.tree.child(node, token)
        self._accuracy.end_pass()

    def _add(self, drafter: str, candidate: Candidate) -> int:
        *before, token = candidate.path
        parent = self.tree.find(before)
        if parent is None:
            raise ValueError(f"{drafter} proposes {candidate.path}, but nothing that begins so was proposed")
        rank = sum(
            promise.drafter == drafter for child in self.tree.children(parent) for promise in self._promises[child]
        )
        promise = Promise(drafter, rank, len(candidate.path), candidate.confidence)
        node = self.tree.add(parent, token)
        if node == len(self._promises):
            self._promises.append([])
            self._likely.append(0.0)
        self._promises[node].append(promise)
        self._likely[node] = max(self._likely[node], self._accuracy.estimate(promise))
        return node

    def _judge(self, node: int, token: int) -> None:
        found: dict[str, bool] = {}
        for child in self.tree.children(node):
            right = self.tree.tokens[child] == token
            for promise in self._promises[child]:
                self._accuracy.record(promise, right)
                found[promise.drafter] = found.get(promise.drafter, False) or right
        for drafter, right in found.items():
            self._accuracy.record(_step_promise(drafter, self.tree.depths[node] + 1), right)


def _step_promise(drafter: str, depth: int) -> Promise:
    return Promise(drafter, STEP, depth, STEP_CONFIDENCE)
