"""Where a recurrent layer can be gone on from: its state after some of the tokens before, which lengths alone choose.

Beside the end of a sequence these are `MARKS` positions: one 17 or 18 tokens before the end of each of the last two
prompts, and the last multiple of `STEP` tokens. Computing 17 tokens again takes a wide pass, so whoever goes on from
there gets the bits of whoever begins afresh; and what a chat template puts behind a prompt fits in between.
"""

from __future__ import annotations

from flashrt_kernels.limits import NARROW_TOKENS

STEP = 1024
PROMPTS = 2
MARKS = PROMPTS + 1
NONE = -1


def prompt_mark(length: int) -> int:
    """The position that is marked of a prompt of `length` tokens, no multiple of `STEP`; below 1 there is none."""
    position = length - (NARROW_TOKENS + 1)
    return position if position % STEP else position - 1


class Marks:
    """The marked positions of a sequence, each in one of `MARKS` places."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Nothing is marked."""
        self.places = [NONE] * MARKS
        self.wanted = NONE  # the position to be marked of the prompt that is being computed

    def held(self) -> list[int]:
        """Marked positions, ascending."""
        return sorted(position for position in self.places if position != NONE)

    def next(self, begin: int, end: int) -> int | None:
        """The first position that is to be marked once tokens from `begin` on, up to `end`, are taken in."""
        step = begin // STEP * STEP + STEP
        found = [position for position in (step, self.wanted) if begin < position <= end]
        return min(found, default=None)

    def take(self, position: int) -> int:
        """The place for a position that is to be marked, which the one of its kind that was marked first gives up."""
        oldest = min(range(PROMPTS), key=lambda i: self.places[i])
        place = oldest if position % STEP else PROMPTS
        self.places[place] = NONE
        return place

    def cut(self, length: int) -> None:
        """Forget what lies behind the first `length` tokens."""
        self.places = [position if position <= length else NONE for position in self.places]
        self.wanted = NONE
