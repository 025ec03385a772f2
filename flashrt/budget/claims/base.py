"""What a kind of FFN asks of a budget.

The planner pins leading blocks of every tensor, owner by owner. A kind that does more with memory than that (slots for
experts, windows of rows, an index) says so in a claim, and finds what it was granted in the tier of its plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from flashrt.budget.owners import owner_of
from flashrt.budget.plan import FixedCosts, TierPlan, Workload
from flashrt.spec import ModelSpec
from flashrt.storage.layout import PackLayout, TensorLayout


@dataclass(frozen=True)
class Case:
    """What is planned for, the budget aside."""

    spec: ModelSpec
    layout: PackLayout
    workload: Workload
    costs: FixedCosts

    @cached_property
    def by_owner(self) -> Mapping[str, Sequence[TensorLayout]]:
        """Owner → its tensors, in execution order."""
        found: dict[str, list[TensorLayout]] = {}
        for tensor in self.layout.tensors.values():
            found.setdefault(owner_of(self.spec, tensor), []).append(tensor)
        return found

    def tensors(self, *owners: str) -> list[TensorLayout]:
        """The tensors of some owners."""
        return [tensor for owner in owners for tensor in self.by_owner.get(owner, ())]


class Claim:
    """The claim of a kind that wants nothing but pinned blocks, as dense ones do; others override what they want.

    `owner` is that of the weights that the tier is for: the planner grants it when their turn has come. Until then it
    keeps `least` back. All sizes are bytes. A claim that finds nothing of its kind asks for nothing.
    """

    owner = "FFN"

    def __init__(self, case: Case) -> None:
        self.case = case

    @property
    def whole(self) -> Sequence[TensorLayout]:
        """Tensors that are resident under every budget; their bytes are among those of `fixed`."""
        return ()

    @property
    def rings(self) -> int:
        """Rings that the kind streams through beside the planner's, each as large as that."""
        return 0

    def fixed(self) -> dict[str, int]:
        """Bytes by owner without which nothing runs."""
        return {}

    def moving(self) -> dict[str, int]:
        """Bytes by owner that it takes besides where anything streams."""
        return {}

    def least(self) -> int:
        """Bytes of the smallest tier that works where weights stream."""
        return 0

    def spares_ring(self, free: int) -> bool:
        """Whether, in `free` bytes for all weights, what is not resident is read by the tier itself, without a ring."""
        return False

    def wanted(self, free: int, ring: bool) -> int:
        """Of `free` bytes for the owner's weights, those that are worth more in the tier than for pinned blocks.

        ring: whether there is one.
        """
        return 0

    def grant(self, free: int, pinned: Mapping[str, int], ring: bool) -> TierPlan:
        """The tier in at most `free` bytes, beside `pinned` blocks (tensor → leading ones, the owner's among them).

        Its `nbytes` are charged to the owner.
        """
        return TierPlan()
