"""Memory for neurons whose place in memory follows the text (see `flashrt.cache.adaptive`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from flashrt.budget.claims.base import Claim
from flashrt.budget.plan import TierPlan
from flashrt.storage.layout import PAGE, TensorLayout

BLOCKS_PER_CALL = 4  # blocks that a pass of few tokens takes from the ring at once: a kernel's threads share them
GROUP_BYTES = 32 << 10  # of neighbours that move together; reads of that size are nearly as fast as any
LONG_GROUP_BYTES = 128 << 10  # where most are resident: which ones matters less than what the rest costs to read


def group_rows(tensor: TensorLayout, resident: int = 0) -> int:
    """Neurons that move together where `resident` of them are in memory.

    A power of two that divides them and a block's, of GROUP_BYTES or LONG_GROUP_BYTES or a little more. With the long
    ones fewer pages are read that hold little of what is missing.
    """
    nbytes = LONG_GROUP_BYTES if 2 * resident > tensor.run_bundles else GROUP_BYTES
    wanted = 1 << max(math.ceil(math.log2(nbytes / tensor.stride)), 0)
    return math.gcd(wanted, tensor.run_bundles, tensor.block_bundles)


def index_bytes(tensor: TensorLayout) -> int:
    """A bound on what is kept beside the neurons of a tensor."""
    groups, pages = tensor.run_bundles // group_rows(tensor), tensor.nbytes // PAGE
    return 8 * tensor.run_bundles + 32 * groups + 8 * pages + 512 * tensor.blocks + 4096


def longest(tensors: Iterable[TensorLayout]) -> int:
    """Neurons of the tensor that has the most."""
    return max((tensor.run_bundles for tensor in tensors), default=0)


@dataclass(frozen=True)
class AdaptiveTier(TierPlan):
    """Dense FFNs whose resident neurons are those that the text uses: those of which a part streams."""

    ffns: tuple[str, ...] = ()


class AdaptiveClaim(Claim):
    """The claim of neurons that drafts are computed with."""

    def moving(self) -> dict[str, int]:
        """What says where each neuron is, and of what use."""
        ffns = self._candidates()
        return {"speculation": sum(map(index_bytes, ffns)) + 4 * longest(ffns)} if ffns else {}

    def grant(self, free: int, pinned: Mapping[str, int], ring: bool) -> AdaptiveTier:
        """None unless a draft finds neurons of every layer, and all else, resident."""
        ffns = self._candidates()
        needed = self.case.tensors("router", "attention", "layer inputs", "head")
        if self.case.tensors("experts") or any(pinned[t.name] < t.blocks for t in needed):
            return AdaptiveTier()
        if any(not pinned[t.name] for t in ffns):
            return AdaptiveTier()
        adaptive = tuple(t.name for t in ffns if pinned[t.name] < t.blocks)
        return AdaptiveTier(ffns=adaptive, drafts=bool(adaptive))

    def _candidates(self) -> list[TensorLayout]:
        """Dense FFNs of a pack that is run exactly, where drafts are asked for and neurons can be gathered.

        None where the neurons of a layer are matrices in a file.
        """
        case = self.case
        if any(tensor.source is not None for tensor in case.tensors("FFN")):
            return []
        drafts = case.workload.max_draft_tokens > 1 and case.costs.supports_gather
        return case.tensors("FFN") if drafts and not case.layout.rows and not case.layout.channel_columns else []
