"""The safetensors header: built with padding so that data starts on a 4 KiB boundary, and read back with bounds.

Format: eight bytes (little-endian length of the header), a JSON object, then the data. Trailing spaces in the JSON
are allowed by the format and serve as padding.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from flashrt_kernels.rows import align

PAGE = 4096
ITEM_BYTES = {"U8": 1, "F32": 4}
FORMAT = {"format": "flashrt"}

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]  # name → (dtype, shape), in the order of the data


def build_header(shapes: Shapes, metadata: Mapping[str, str] = FORMAT) -> bytes:
    """The header, its eight length bytes included, padded to a multiple of 4 KiB."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape) in shapes.items():
        end = offset + ITEM_BYTES[dtype] * math.prod(shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    size = align(8 + len(text), PAGE)
    return (size - 8).to_bytes(8, "little") + text.ljust(size - 8)


def header_bytes(shapes: Shapes) -> int:
    """Length of `build_header(shapes)`: where the data starts."""
    return len(build_header(shapes))
