"""How far a sequence can be cut back: decided by lengths alone, so that it is the same under every budget.

How many tokens are new decides whether narrow or wide passes compute them. Were that to depend on what memory happens
to hold, logits would depend on the budget.
"""

from __future__ import annotations

from flashrt_kernels.limits import ATTENTION_SEGMENT, NARROW_TOKENS

KEPT = 128  # positions before the window that stay
LOST = 1 << 62  # where a store stands while it moves: should that be interrupted, it is not gone on from


def reach(window: int | None, length: int, top: int) -> int:
    """How many of the first `length` tokens can be gone on from, in a sequence that has had `top`: all or none.

    window: the tokens that a query of the layer sees; None: all
    """
    if window is None or top - length <= KEPT - NARROW_TOKENS:  # drafts may have stood that far behind `top`
        return length
    unmoved = window - 1 + KEPT + ATTENTION_SEGMENT - 1  # rows that begin here or before fit in the smallest memory
    return length if top + NARROW_TOKENS <= unmoved else 0


def needed(window: int | None, top: int) -> int:
    """The first position that is needed to go on, from wherever `reach` allows: the first of a segment.

    Every store of a sequence that has had `top` tokens holds it and what follows.
    """
    if window is None:
        return 0
    return max(top + NARROW_TOKENS - KEPT - (window - 1), 0) // ATTENTION_SEGMENT * ATTENTION_SEGMENT
