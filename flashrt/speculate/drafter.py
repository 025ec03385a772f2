"""What all drafters have in common: they are told what stands, and propose what may follow.

What is drafted decides nothing but speed (`acceptance.verify`), so a drafter may choose as it likes: the tokens that it
thinks likeliest, or, with logits of its own, what a copy of the sequence's sampler makes of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol


class Candidate(NamedTuple):
    """A guess: after the last certain token come the tokens of `path`."""

    path: tuple[int, ...]
    confidence: float  # probability, as the drafter sees it, of the last token of `path` when the others are right


class Drafter(Protocol):
    """A source of candidates for one sequence."""

    @property
    def name(self) -> str:
        """By which its times and its accuracy are kept and reported."""

    def accept(self, tokens: Sequence[int]) -> None:
        """These tokens are certain now: the prompt first, then what each pass has brought."""

    def propose(self) -> Iterator[list[Candidate]]:
        """Candidates, step by step: a step is computed when it is asked for, and no more are asked for than pay.

        What has to be computed before the first step, such as the prompt, is computed by the call itself: it is no part
        of what a step costs.

        A path without its last token is empty or was proposed before. Of candidates that differ in their last token
        only, the first choice comes first. A step may hold tokens of any depth, or none; the next one, if there is one,
        goes on from its first candidate.
        """
