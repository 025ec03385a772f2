"""Memory for the experts of a mixture: slots of a whole expert each, where all else is resident.

As many as fit, and at least those that a token needs in two layers, so that one can be read for while the other
computes. Where fewer fit, leading blocks of experts are pinned instead and the rest streams.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flashrt.budget.claims.base import Case, Claim
from flashrt.budget.owners import prefix_bytes
from flashrt.budget.plan import TierPlan
from flashrt.storage.layout import PAGE, TensorLayout
from flashrt_kernels.rows import align


@dataclass(frozen=True)
class ExpertTier(TierPlan):
    """A cache of `experts` slots, each `slot_bytes` large; none where experts are pinned or stream."""

    experts: int = 0
    slot_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        return {"expert_slots": self.experts, "expert_slot_bytes": self.slot_bytes}

    def lines(self, size: Callable[[float], str]) -> dict[str, str]:
        if not self.experts:
            return {}
        cached = f"{self.experts} in memory, of {size(self.slot_bytes)} each"
        return {"experts": f"{cached}; read per token as if routers chose at random"}


class ExpertClaim(Claim):
    """The claim of mixtures."""

    owner = "experts"

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self._tensors = case.tensors("experts")
        sizes, self._experts = Counter[str](), dict[str, int]()
        for tensor in self._tensors:
            layer = tensor.name.partition(".")[0]
            sizes[layer] += tensor.run_stride * tensor.stride + (0 if tensor.source is None else PAGE)
            self._experts[layer] = tensor.runs
        self._expert_bytes = align(max(sizes.values(), default=0), PAGE)

    @property
    def rings(self) -> int:
        """One: which experts come next is known too late for the planner's, which runs ahead across layers."""
        return 1 if self._tensors else 0

    def spares_ring(self, free: int) -> bool:
        others = self.case.tensors("router", "attention", "layer inputs", "head", "shared experts", "FFN")
        return self._slots(free - sum(t.nbytes for t in others)) > 0

    def wanted(self, free: int, ring: bool) -> int:
        return 0 if ring else self._slots(free) * self._expert_bytes

    def grant(self, free: int, pinned: Mapping[str, int], ring: bool) -> ExpertTier:
        whole = all(pinned[t.name] == t.blocks for t in self._tensors)
        slots = 0 if ring or whole else free // self._expert_bytes
        nbytes = slots * self._expert_bytes
        reads = {t.name: self._read_bytes(t, pinned[t.name], slots) for t in self._tensors}
        return ExpertTier(
            nbytes=nbytes,
            loaded_bytes=nbytes,
            reads=reads,
            reads_in_place=slots > 0,
            experts=slots,
            slot_bytes=self._expert_bytes if slots else 0,
        )

    def _slots(self, free: int) -> int:
        """Experts that fit; 0 where all of them do, or too few to cache."""
        if not self._tensors or sum(t.nbytes for t in self._tensors) <= free:
            return 0
        slots = max(free, 0) // self._expert_bytes
        return slots if slots >= 2 * max(layer.ffn.experts_per_token for layer in self.case.spec.layers) else 0

    def _read_bytes(self, tensor: TensorLayout, pinned: int, slots: int) -> int:
        """Bytes of a layer's experts that one token reads.

        A cache counts as if routers chose at random, which is the worst for it: any other choice has favourites.
        """
        ffn = self.case.spec.layers[int(tensor.name.partition(".")[0])].ffn
        rest, every = tensor.nbytes - prefix_bytes(tensor, pinned), sum(self._experts.values())
        return rest * ffn.experts_per_token * (every - slots) // (ffn.experts * every)
