"""Where the tensors of a safetensors file lie.

The library checks the header, which comes from anywhere: its types, and that tensors lie one after the other from the
end of the header to the end of the file. It reads no weights: it maps the file, so that a whole checkpoint would become
resident, and gives numpy no bfloat16.

Format: eight bytes (little-endian length of the header), a JSON object {name: {dtype, shape, data_offsets}}, the data.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from flashrt.errors import CheckpointError
from flashrt.storage.sources.files import refuse_pointer
from flashrt.storage.sources.stored import PLAIN_CODECS, StoredTensor, stored_tensor

MAX_HEADER = 32 << 20  # bytes; 140,000 tensors take 17 MB


def read_header(path: Path) -> tuple[dict[str, StoredTensor], str]:
    """Every tensor of the file and a digest of the header. Raises CheckpointError."""
    text = _header(path)
    entries = json.loads(text)
    entries.pop("__metadata__", None)
    data = 8 + len(text)
    tensors = {}
    for name, entry in entries.items():
        (begin, end), dtype = entry["data_offsets"], entry["dtype"]
        codec = PLAIN_CODECS.get(dtype)
        tensors[name] = stored_tensor(name, tuple(entry["shape"]), dtype, codec, path, data + begin, end - begin)
    return tensors, hashlib.sha256(text).hexdigest()


def _header(path: Path) -> bytes:
    """The checked JSON text, bounded before it is read."""
    from safetensors import SafetensorError, safe_open

    refuse_pointer(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(MAX_HEADER, size - 8):
                raise CheckpointError(f"{path} is not a safetensors file, or is truncated: header of {length} bytes")
            text = file.read(length)
        with safe_open(path, "numpy"):
            return text
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or truncated: {error}") from error
