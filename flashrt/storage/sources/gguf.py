"""A checkpoint in a GGUF file, or in the parts that one was split into."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from flashrt.arch import family_of
from flashrt.arch.gguf import ROPE_FACTORS, gguf_config, with_biases
from flashrt.errors import CheckpointError
from flashrt.storage.gguf_files import part_names, part_of, refuse_piece
from flashrt.storage.sources.checkpoint import Checkpoint
from flashrt.storage.sources.files import MERGE_ADAPTER
from flashrt.storage.sources.gguf_header import read_gguf
from flashrt.storage.sources.stored import StoredTensor
from flashrt.storage.sources.tensors import TensorReader
from flashrt.text.gguf import gguf_ends, text_from_gguf
from flashrt_kernels.limits import WIDEST_HEAD


def open_gguf(path: Path, name: str | None = None, source: str | None = None) -> Checkpoint:
    """Open a file, or the first of several parts; reads headers only. Raises CheckpointError."""
    refuse_piece(path)
    header = read_gguf(path)
    if header.metadata.get("general.type") == "adapter":
        raise CheckpointError(f"{path} is an adapter (LoRA), not a model: {MERGE_ADAPTER}")
    reader = TensorReader(header.tensors)

    def shape(tensor: str) -> Sequence[int] | None:
        return header.tensors[tensor].shape if tensor in header.tensors else None

    try:
        factors = _rope_factors(header.tensors, reader)
        config = gguf_config(header.metadata, shape, factors)
        family = family_of(config["model_type"])
        spec = with_biases(family.spec(config), header.tensors.__contains__).ending(gguf_ends(header.metadata))
    except (TypeError, ValueError, KeyError, ArithmeticError) as error:
        raise CheckpointError(f"{path} is damaged: its metadata makes no sense ({error})") from error
    stats = [path.with_name(name).stat() for name in part_names(path.name)]
    identity = f"{path.name} {[(s.st_size, s.st_mtime_ns) for s in stats]} {header.digest}"
    return Checkpoint(
        spec=spec,
        name=name or (part_of(path.name) or (path.stem,))[0],
        source=source or f"GGUF file {path}",
        fingerprint=hashlib.sha256(os.fsencode(identity)).hexdigest(),
        reader=reader,
        tensor_map=family.gguf_tensors(spec, header.tensors.__contains__),
        text=lambda: text_from_gguf(header.metadata),
    )


def _rope_factors(tensors: Mapping[str, StoredTensor], reader: TensorReader) -> dict[str, list[float]]:
    result = {}
    for name in ROPE_FACTORS:
        tensor = tensors.get(name)
        if tensor is None:
            continue
        if len(tensor.shape) != 1 or tensor.shape[0] > WIDEST_HEAD // 2:
            raise CheckpointError(f"{tensor.path}: {name} has shape {list(tensor.shape)}, expected half a head")
        result[name] = reader.vector(name).tolist()
    return result
