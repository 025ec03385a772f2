"""How checkpoints store numbers: plain ones, and the blocks of GGUF files, a few numbers with their scales.

A block is `numbers` consecutive numbers of a row in `nbytes` bytes, little-endian; the gguf package is the reference.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stored:
    """One way to store numbers. `number` is the one by which the extension knows it."""

    number: int
    numbers: int
    nbytes: int


LARGEST_EXPONENT = 252  # of a block of MXFP4 whose weights are all finite
STORED = {
    "F32": Stored(0, 1, 4),
    "F16": Stored(1, 1, 2),
    "BF16": Stored(2, 1, 2),
    "F64": Stored(3, 1, 8),
    "Q4_0": Stored(4, 32, 18),
    "Q4_1": Stored(5, 32, 20),
    "Q5_0": Stored(6, 32, 22),
    "Q5_1": Stored(7, 32, 24),
    "Q8_0": Stored(8, 32, 34),
    "Q2_K": Stored(9, 256, 84),
    "Q3_K": Stored(10, 256, 110),
    "Q4_K": Stored(11, 256, 144),
    "Q5_K": Stored(12, 256, 176),
    "Q6_K": Stored(13, 256, 210),
    "IQ4_NL": Stored(14, 32, 18),
    "IQ4_XS": Stored(15, 256, 136),
    "MXFP4": Stored(16, 32, 17),
}
