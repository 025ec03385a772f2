"""Finding the tensors that belong to a quantized matrix, and saying what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from flashrt.errors import CheckpointError
from flashrt.storage.sources.quantized.weights import Read, Region
from flashrt.storage.sources.stored import PLAIN_CODECS, StoredTensor

Tensors = Mapping[str, StoredTensor]
SCALES = (*PLAIN_CODECS, "F8_E4M3", "F8_E8M0", "U8")


def member(tensors: Tensors, module: str, leaf: str, *dtypes: str) -> StoredTensor:
    """The tensor `leaf` of a module, of one of `dtypes`. Raises CheckpointError where it is missing or another."""
    name = f"{module}.{leaf}"
    tensor = tensors.get(name)
    if tensor is None:
        raise CheckpointError(f"{module} is stored quantized, and its tensor {name} is missing")
    if dtypes:
        need_dtype(tensor, *dtypes)
    return tensor


def read_integers(read: Read, tensor: StoredTensor) -> NDArray[np.int64]:
    """All numbers of a vector of integers."""
    row = replace(tensor, shape=(1, *tensor.shape))
    raw = read(row, Region((0, 1), (0, tensor.shape[0])))[0]
    return raw.view({"I32": "<i4", "I64": "<i8"}[tensor.dtype]).astype(np.int64)


def found(tensors: Tensors, module: str, *leaves: str) -> tuple[StoredTensor, ...]:
    """Those of a module's tensors that there are."""
    return tuple(tensors[name] for leaf in leaves if (name := f"{module}.{leaf}") in tensors)


def modules_with(tensors: Tensors, leaf: str) -> list[str]:
    """The modules that have a tensor `leaf`."""
    return [name.removesuffix(f".{leaf}") for name in tensors if name.endswith(f".{leaf}")]


def need_dtype(tensor: StoredTensor, *dtypes: str) -> None:
    """Raises CheckpointError for another type."""
    if tensor.dtype not in dtypes:
        raise CheckpointError(f"tensor {tensor.name} is stored as {tensor.dtype}, expected {' or '.join(dtypes)}")


def need_shape(tensor: StoredTensor, shape: Sequence[int]) -> None:
    """Raises CheckpointError for another shape."""
    if tensor.shape != tuple(shape):
        raise CheckpointError(f"tensor {tensor.name} has shape {list(tensor.shape)}, expected {list(shape)}")


def need_matrix(tensor: StoredTensor) -> tuple[int, int]:
    """(rows, columns). Raises CheckpointError for anything but a matrix that holds something."""
    if len(tensor.shape) != 2 or 0 in tensor.shape:
        raise CheckpointError(f"tensor {tensor.name} has shape {list(tensor.shape)}, expected a matrix")
    return tensor.shape[0], tensor.shape[1]


def need_scales(tensor: StoredTensor) -> None:
    """Raises CheckpointError for what is no type of scales."""
    if tensor.dtype not in SCALES:
        raise CheckpointError(f"tensor {tensor.name} is stored as {tensor.dtype}, expected scales: {', '.join(SCALES)}")
