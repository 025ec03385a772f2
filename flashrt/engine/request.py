"""What is asked of an engine, checked once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flashrt.config import Sampling
from flashrt.errors import UsageError


@dataclass(frozen=True, slots=True)
class Request:
    """A text to go on with. `stop_ids` end it, and so do the strings `stop`; `reuse` keeps what the last one shares."""

    prompt: list[int]
    limit: int  # new tokens, at most
    sampling: Sampling
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    reuse: bool = False


def check_ids(ids: Sequence[int], vocab: int) -> None:
    """Raises UsageError for tokens that the model does not know."""
    if len(ids) and not (min(ids) >= 0 and max(ids) < vocab):
        raise UsageError(f"the text has token ids outside 0 to {vocab - 1}, which the model does not know")


def token_limit(ids: Sequence[int], max_new_tokens: int | None, context: int) -> int:
    """How many tokens may come after the prompt `ids`. Raises UsageError where so many do not fit."""
    if not ids:
        raise UsageError("the prompt is empty: give at least one token")
    if len(ids) >= context:
        raise UsageError(
            f"the prompt has {len(ids)} tokens, the context is {context}: use a shorter prompt or a larger --context"
        )
    if max_new_tokens is None:
        return context - len(ids)
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens is {max_new_tokens}, expected 1 or more")
    if len(ids) + max_new_tokens > context:
        raise UsageError(
            f"{len(ids)} prompt tokens and {max_new_tokens} new ones do not fit in the context of {context}: "
            "ask for fewer, or for a larger --context"
        )
    return max_new_tokens
