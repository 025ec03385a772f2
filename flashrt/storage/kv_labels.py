"""The labels of a pack's keys on disk: a safetensors file beside its weights, bound to the pack's hash.

What describes them lies in the header's metadata, with a SHA-256 over that and over the data.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from flashrt.errors import PackError, UsageError
from flashrt.labels import KvLabels, LayerLabels, check_arrays, check_description, shapes
from flashrt.spec import ModelSpec
from flashrt.storage.atomic import write_atomically
from flashrt.storage.pack import Pack
from flashrt.storage.safetensors_file import FORMAT, Shapes, build_header

LABELS_FILE = "kv-labels.safetensors"
LENGTH_BYTES = 8
CHUNK_BYTES = 1 << 20  # hashed at a time
MOST_HEADER_BYTES = 16 << 20  # a description of 4096 layers is smaller


def write_labels(path: Path, labels: KvLabels, spec: ModelSpec) -> None:
    """Write them into the directory `path`, whole or not at all. Raises DiskError."""
    description = json.dumps(labels.describe(), sort_keys=True)
    arrays = [array for layer in labels.layers if layer is not None for array in layer.arrays().values()]
    data = b"".join(np.ascontiguousarray(array, "<f4").tobytes() for array in arrays)
    metadata = _metadata(description, data)
    write_atomically(path / LABELS_FILE, build_header(_shapes(labels.describe(), spec), metadata) + data)


def find_labels(pack: Pack) -> KvLabels | None:
    """The labels of a pack; None where it has none. Raises PackError as `read_labels` does."""
    return read_labels(pack) if os.path.lexists(pack.path / LABELS_FILE) else None


def read_labels(pack: Pack) -> KvLabels:
    """The labels of a pack.

    Raises UsageError where there are none, PackError where they are damaged, or those of another pack or version.
    """
    path = pack.path / LABELS_FILE
    again = f"run `flashrt calibrate {pack.path} --kv` again"
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise PackError(f"{path} is no file: remove it, and {again}")
    try:
        with open(path, "rb") as file:
            labels = _read(file, path.stat().st_size, pack)
    except FileNotFoundError:
        raise UsageError(
            f"{pack.path} has no labels of keys, which --kv sparse chooses by: run `flashrt calibrate {pack.path} --kv`"
        ) from None
    except OSError as error:
        raise PackError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # ValueError: what is no text, and no JSON, too
        raise PackError(f"{path} is damaged, or of another version: {error}; {again}") from None
    if labels is None:
        raise PackError(f"{path} was calibrated for another pack: {again}")
    return labels


def _read(file: IO[bytes], size: int, pack: Pack) -> KvLabels | None:
    """None for those of another pack, which may have other layers.

    Raises ValueError for whatever `write_labels` would not have written. Nothing larger than expected is held.
    """
    length = int.from_bytes(file.read(LENGTH_BYTES), "little")
    if not 0 < length <= min(MOST_HEADER_BYTES, size - LENGTH_BYTES):
        raise ValueError(f"its header has {length} bytes of a file of {size}")
    header = file.read(length)
    metadata = _described(header)
    description = json.loads(metadata["labels"])
    if _is_foreign(description, pack.manifest.hash) and _checksum(metadata["labels"], file) == metadata.get("sha256"):
        return None
    check_description(description, pack.spec)
    layout = _shapes(description, pack.spec)
    expected = sum(4 * int(np.prod(shape)) for _, shape in layout.values())
    if LENGTH_BYTES + length + expected != size:
        raise ValueError(f"it has {size} bytes, expected {LENGTH_BYTES + length + expected}")
    file.seek(LENGTH_BYTES + length)
    data = file.read(expected)
    if len(data) != expected or build_header(layout, _metadata(metadata["labels"], data))[LENGTH_BYTES:] != header:
        raise ValueError("its checksum does not match")
    return _assembled(description, layout, data)


def _described(header: bytes) -> Mapping[str, str]:
    try:
        metadata = json.loads(header)["__metadata__"]
        if isinstance(metadata["labels"], str):
            return metadata
    except (TypeError, KeyError):
        pass
    raise ValueError("it holds no labels of keys")


def _is_foreign(description: Any, base: str) -> bool:
    return isinstance(description, Mapping) and isinstance(description.get("base"), str) and description["base"] != base


def _metadata(description: str, data: bytes) -> dict[str, str]:
    return {**FORMAT, "labels": description, "sha256": _checksum(description, io.BytesIO(data))}


def _checksum(description: str, data: IO[bytes]) -> str:
    """Of a description and all that follows in `data`."""
    digest = hashlib.sha256(description.encode())
    while chunk := data.read(CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def _shapes(description: Mapping[str, Any], spec: ModelSpec) -> Shapes:
    """Those of all arrays, in the order of the file; `{i}.keys` is an array of layer i."""
    return {
        f"{i}.{name}": ("F32", shape)
        for i, (layer, channels) in enumerate(zip(spec.layers, description["channels"], strict=True))
        if channels is not None
        for name, shape in shapes(layer.attention, channels).items()
    }


def _assembled(description: Mapping[str, Any], layout: Shapes, data: bytes) -> KvLabels:
    arrays, offset = {}, 0
    for name, (_, shape) in layout.items():
        count = int(np.prod(shape))
        arrays[name] = np.frombuffer(data, "<f4", count, offset).astype(np.float32).reshape(shape)
        offset += 4 * count
    layers: list[LayerLabels | None] = []
    for i, channels in enumerate(description["channels"]):
        if channels is None:
            layers.append(None)
            continue
        layer = LayerLabels(*(arrays[f"{i}.{name}"] for name in ("keys", "queries", "low", "step")))
        check_arrays(layer)
        layers.append(layer)
    shares = tuple(tuple(map(float, shares)) for shares in description["shares"])
    losses = {keep: float(loss) for keep, loss in description["losses"].items()}
    return KvLabels(description["base"], description["block"], tuple(layers), shares, losses)
