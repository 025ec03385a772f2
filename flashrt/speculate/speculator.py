"""One sequence's speculation: asks the drafters, shapes the tree of each pass, and learns from what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from flashrt.speculate.accuracy import Accuracy
from flashrt.speculate.control import FREE, best_nodes, worth_a_step
from flashrt.speculate.costs import PassCost, StepCosts
from flashrt.speculate.drafter import Candidate, Drafter
from flashrt.speculate.proposals import Proposals
from flashrt.speculate.switch import Switch
from flashrt.speculate.tree import ROOT, TokenTree


class Experience:
    """What was learned of drafters, draft steps and passes: of a model under a plan, whoever's text it was."""

    def __init__(self) -> None:
        self.accuracy, self.pass_cost, self.step_costs, self.switch = Accuracy(), PassCost(), StepCosts(), Switch()


class Speculator:
    """Trees for the passes of one sequence, from `drafters`, the cheapest first.

    For each pass `draft` gives the tree to verify, and `learn` takes what came of it. The first pass that there ever is
    has one position: what a pass costs is known only then. Times shape the trees, so these differ from run to run; what
    stands does not depend on them (`acceptance.verify`).
    """

    def __init__(
        self,
        drafters: Sequence[Drafter],
        tokens: Sequence[int],
        experience: Experience,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`tokens` are all so far, the last one not yet computed; `clock` returns seconds."""
        self._drafters, self._experience, self._clock = drafters, experience, clock
        self._proposals = Proposals(tokens[-1], experience.accuracy)
        self._spent: float | None = None  # seconds that drafting took for this pass; None where there was none
        self._tell(tokens)

    def draft(self, limit: int) -> TokenTree:
        """The tree to verify next, of `limit` positions at most. Its root is the last token told."""
        tree, cost = self._proposals.tree, self._experience.pass_cost
        self._spent = None
        if not cost.measured or limit == 1 or not self._experience.switch.drafts():
            return tree
        began, pass_seconds = self._clock(), cost.seconds(limit)
        for drafter in self._drafters:
            self._ask(drafter, pass_seconds, began)
        tree = tree.select(best_nodes(self._proposals.chances(), pass_seconds, self._clock() - began))
        spent = self._clock() - began
        if len(tree) > 1 or spent > FREE * pass_seconds[0]:
            self._spent = spent
        return tree

    def learn(self, tokens: Sequence[int], positions: int, seconds: float) -> None:
        """A pass over `positions` took `seconds`, and `tokens` are what stands after the root: one at least."""
        experience = self._experience
        experience.pass_cost.record(positions, seconds)
        experience.switch.record(self._spent is not None, len(tokens), seconds + (self._spent or 0.0))
        self._proposals.learn(tokens)
        self._proposals = Proposals(tokens[-1], experience.accuracy)
        self._tell(tokens)

    def _tell(self, tokens: Sequence[int]) -> None:
        for drafter in self._drafters:
            drafter.accept(tokens)

    def _ask(self, drafter: Drafter, pass_seconds: Sequence[float], began: float) -> None:
        """Have a drafter propose while it pays."""
        costs, frontier = self._experience.step_costs, [ROOT]
        steps: Iterator[list[Candidate]] | None = None
        while frontier:
            gains = self._proposals.outlook(drafter.name, frontier, len(pass_seconds) - 1)
            spent, step_seconds = self._clock() - began, costs.seconds(drafter.name)
            if not worth_a_step(self._proposals.chances(), gains, step_seconds, pass_seconds, spent):
                break
            steps = steps or drafter.propose()
            asked = self._clock()
            candidates = next(steps, [])
            costs.record(drafter.name, self._clock() - asked)
            frontier = self._proposals.add(drafter.name, candidates)
        if steps is None:
            costs.pass_by(drafter.name)
