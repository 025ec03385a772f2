"""Memory that requests take beside the model: bounded here, and claimed of the budget before the model is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from flashrt.server.job import Part

RESULT_BYTES = 6 << 20  # of one answer, while it is put together
BODIES = 2  # of the largest size, that may be arriving or waiting to be read at a time
READ_FACTOR = 22  # times its size, that a body takes while it is parsed and rendered: of nothing but empty lists
ENCODED = 320  # bytes that encoding takes for a token of context
TOKEN = 200  # bytes of an answer's token as it comes and is written
CANDIDATE = 400  # bytes of a token with its log-probability, as it comes and is written
CONNECTION = 96 << 10  # bytes of buffers
CONNECTIONS = 64  # at a time, beside those of requests that wait


def request_bytes(body: int, context: int, queue: int) -> int:
    """Bytes that requests take at most: bodies of `body` bytes, `queue` prompts that wait, one answer being written.

    A result that a slow client has not read yet may stand beside the one that is computed.
    """
    bodies = (BODIES + READ_FACTOR) * body
    prompts = ENCODED * context + 4 * (queue + 1) * most_prompt_tokens(context)
    return bodies + prompts + 2 * RESULT_BYTES + CONNECTION * most_connections(queue) // 4


def most_prompt_tokens(context: int) -> int:
    """Of all prompts of a request."""
    return max(context, 1 << 14)


def most_connections(queue: int) -> int:
    return queue + CONNECTIONS


def most_tokens(answers: int, top_logprobs: int | None) -> int:
    """Tokens that so many answers may have each, where nobody said how many."""
    named = 0 if top_logprobs is None else top_logprobs + 1
    return RESULT_BYTES // (answers * (TOKEN + CANDIDATE * named))


def result_bytes(parts: Sequence[Part], top_logprobs: int | None) -> int:
    """Bytes that the answers to `parts` take at most."""
    total = 0
    for part in parts:
        named = 0 if top_logprobs is None else top_logprobs + 1
        total += part.limit * (TOKEN + CANDIDATE * named)
        if part.prompt_logprobs is not None:
            total += len(part.prompt) * (TOKEN + CANDIDATE * (part.prompt_logprobs + 1))
    return total
