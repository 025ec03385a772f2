"""Codes of 4 or 8 bits in words of 32, the first in the lowest bits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flashrt.storage.sources.decoding import Raw
from flashrt.storage.sources.quantized.nibbles import split_nibbles
from flashrt.storage.sources.quantized.weights import Read, Region
from flashrt.storage.sources.stored import StoredTensor

Span = tuple[int, int]


def packed_along_columns(
    read: Read, words: StoredTensor, region: Region, bits: int, *, add: int = 0, order: Sequence[int] | None = None
) -> Raw:
    """A region of codes, uint8 [rows, columns], of words that hold neighbours of a row.

    add: added to every word first, modulo 2 ** 32
    order: which code of a word comes where
    """
    first, last, per = _words(region.columns, bits)
    raw = np.ascontiguousarray(read(words, Region(region.rows, (first, last))))
    if add:
        raw = (raw.view("<u4") + np.uint32(add)).view(np.uint8)
    codes = split_nibbles(raw) if bits == 4 else raw
    if order is not None:
        codes = codes.reshape(len(codes), -1, per)[..., order].reshape(len(codes), -1)
    return codes[:, region.columns[0] - first * per : region.columns[1] - first * per]


def packed_along_rows(read: Read, words: StoredTensor, region: Region, bits: int) -> Raw:
    """A region of codes, turned around: uint8 [columns, rows], of words that hold neighbours of a column."""
    first, last, per = _words(region.rows, bits)
    raw = read(words, Region((first, last), region.columns))
    turned = raw.reshape(last - first, -1, 4).swapaxes(0, 1).reshape(-1, 4 * (last - first))
    codes = split_nibbles(turned) if bits == 4 else turned
    return codes[:, region.rows[0] - first * per : region.rows[1] - first * per]


def words_of(codes: int, bits: int) -> int:
    """Words that hold so many codes."""
    return -(-codes * bits // 32)


def _words(span: Span, bits: int) -> tuple[int, int, int]:
    """(first word, last + 1, codes of a word)."""
    per = 32 // bits
    return span[0] // per, -(-span[1] // per), per
