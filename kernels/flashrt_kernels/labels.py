"""How labels lie in memory: a few numbers of each key, 4 bits each, by which `select` tells what a query attends to.

uint8 [kv_heads, groups, channels / 8, 16, 4]: tokens in groups of 16, channels in groups of 8. Byte j of a token holds
the codes of channels c + j (low four bits) and c + 4 + j, so that one load has four neighbours of all 16 tokens.
"""

from __future__ import annotations

LABEL_TOKENS = 16  # tokens of a group
LABEL_CHANNELS = 8  # channels of a group
LABEL_CODES = 16  # values of a code


def label_shape(kv_heads: int, context: int, channels: int) -> tuple[int, int, int, int, int]:
    """Shape of the labels of `context` positions; channels is a multiple of LABEL_CHANNELS."""
    return kv_heads, -(-context // LABEL_TOKENS), channels // LABEL_CHANNELS, LABEL_TOKENS, LABEL_CHANNELS // 2
