"""Whether a GGUF file is packed before its first run, or its weights stream from the file itself."""

from __future__ import annotations

from dataclasses import dataclass

from flashrt.budget.plan import Plan

PACK_RATE = 120e6  # bytes/s: packing what a file has, on two cores that others use
PACK_SECONDS = 15.0  # nobody waits longer for a first answer unless it was asked for


@dataclass(frozen=True, slots=True)
class Packing:
    """What a pack would be, of a file whose weights the budget does not hold whole.

    plan: of the pack; seconds: that making it takes; first: whether it is made before the file is run, `why` it is or
    is not as one clause
    """

    plan: Plan
    nbytes: int
    seconds: float
    first: bool
    why: str

    @classmethod
    def of(cls, nbytes: int, streaming: Plan | None, packed: Plan, free: int) -> Packing:
        """`streaming` is the plan of the file itself, None where no plan is; `free` are bytes of the cache's disk.

        Resident neurons of a pack draft, so one pass over what streams gives several tokens. Where they do not, a pack
        streams the same bytes as the file.
        """
        seconds = nbytes / PACK_RATE
        if streaming is None:
            return cls(packed, nbytes, seconds, True, "this budget is too small to stream from the file itself")
        if not packed.drafts:
            return cls(packed, nbytes, seconds, False, "a pack would stream as much")
        gain = "resident neurons of a pack draft, so that one pass over the weights gives several tokens"
        if nbytes > free:
            return cls(packed, nbytes, seconds, False, f"{gain}, and the cache's disk has no room for it")
        return cls(packed, nbytes, seconds, seconds <= PACK_SECONDS, gain)
