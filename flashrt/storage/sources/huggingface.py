"""A checkpoint as transformers writes it: a directory of safetensors files, config.json and tokenizer files."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flashrt.arch import TensorMap, family_of
from flashrt.arch.config import Config
from flashrt.arch.wrappers import text_config
from flashrt.errors import CheckpointError, CheckpointWarning
from flashrt.spec import ModelSpec
from flashrt.storage.sources.checkpoint import Checkpoint
from flashrt.storage.sources.files import MERGE_ADAPTER, read_json, refuse_pickles
from flashrt.storage.sources.quantized.registry import model_tensors
from flashrt.storage.sources.safetensors_header import read_header
from flashrt.storage.sources.stored import StoredTensor
from flashrt.storage.sources.tensors import TensorReader
from flashrt.storage.sources.text import directory_text
from flashrt.text.added import vocabulary
from flashrt.text.ends import end_ids
from flashrt.text.files import TextFiles

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"
_SHOWN = 3


def open_directory(
    directory: Path, name: str | None = None, source: str | None = None, headers_only: bool = False
) -> Checkpoint:
    """Open a directory; see `open_checkpoint` for what is read, and `model_tensors` for `headers_only`.

    Raises CheckpointError.
    """
    _refuse_adapter(directory)
    config = read_json(directory / "config.json")
    if "model_type" not in config:
        raise CheckpointError(f"{directory / 'config.json'} names no model_type")
    model = text_config(config)
    family = family_of(model["model_type"])
    generation = read_json(directory / "generation_config.json", required=False)
    text = directory_text(directory, family.name, generation)
    spec = family.spec(model).ending(_end_tokens(text, generation))
    stored, digest = _tensors(directory)
    quantization = _quantization(config, model)
    tensors = model_tensors(quantization, stored, headers_only=headers_only)
    reader = TensorReader(tensors)
    if not headers_only:
        spec = _with_stored_head(spec, family.tensors(spec, tensors.__contains__), reader)
    return Checkpoint(
        spec=spec,
        name=name or directory.resolve().name,
        source=source or f"Hugging Face checkpoint {directory}",
        fingerprint=_fingerprint(config, generation, digest),
        reader=reader,
        quantization=quantization,
        tensor_map=family.tensors(spec, tensors.__contains__),
        text=lambda: text,
    )


def _quantization(config: Mapping[str, Any], model: Mapping[str, Any]) -> Any:
    """What says how the checkpoint is quantized: the model around a text model, or else the text model."""
    own = config.get("quantization_config")
    return model.get("quantization_config") if own is None else own


def _refuse_adapter(directory: Path) -> None:
    if (directory / ADAPTER).exists() and not any((directory / name).exists() for name in (SINGLE, INDEX)):
        raise CheckpointError(f"{directory} holds an adapter (LoRA), not a model: {MERGE_ADAPTER}")


def _end_tokens(text: TextFiles, generation: Mapping[str, Any]) -> list[int]:
    """All that name one: generation_config.json, the tokenizer and the chat template know more than config.json."""
    found = Config(generation, "generation").token_ids("eos_token_id")
    ids, added = vocabulary(text.tokenizer)
    return [*found, *end_ids(ids, added, text.chat_template, text.special_tokens)]


def _with_stored_head(spec: ModelSpec, names: TensorMap, reader: TensorReader) -> ModelSpec:
    """Untied where a head is stored beside a config that says tied, and differs: as transformers decides it."""
    (embed,) = names.parts("embed")
    found = reader.tensors.get(embed.tensor)
    if not spec.tied or names.head not in reader.tensors or found is None or found.shape != (spec.vocab, spec.hidden):
        return spec
    return replace(spec, tied=reader.equal(embed.tensor, names.head))


def _tensors(directory: Path) -> tuple[dict[str, StoredTensor], str]:
    """Every tensor of every file, and a digest of file names, sizes, times and headers."""
    digest = hashlib.sha256()
    tensors: dict[str, StoredTensor] = {}
    for path in _weight_files(directory):
        found, header = read_header(path)
        status = path.stat()
        digest.update(os.fsencode(f"{path.name} {status.st_size} {status.st_mtime_ns} {header}\n"))
        if twice := tensors.keys() & found.keys():
            raise CheckpointError(f"{path} holds {min(twice)} again: another file of the checkpoint has it already")
        tensors |= found
    return tensors, digest.hexdigest()


def _weight_files(directory: Path) -> list[Path]:
    found = sorted(path.name for path in directory.glob("*.safetensors"))
    if SINGLE in found:  # beside an index too, as transformers decides it
        named = _named(read_json(directory / INDEX, required=False).get("weight_map"))
        if named and named != [SINGLE]:
            why = f"{SINGLE} comes before an index, as in transformers, and {INDEX} names {_listed(named)}"
            _note(directory, [SINGLE], why)
        return [directory / SINGLE]
    if (directory / INDEX).exists():
        return _indexed_files(directory, found)
    if len(found) == 1:
        return [directory / found[0]]
    if found:
        raise CheckpointError(
            f"{directory} holds {len(found)} safetensors files, but not the index of them: download {INDEX} too"
        )
    refuse_pickles((path.name for path in sorted(directory.glob("*"))), str(directory))
    raise CheckpointError(f"{directory} holds no safetensors weights: expected {SINGLE}")


def _indexed_files(directory: Path, found: list[str]) -> list[Path]:
    weights = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights.values()):
        raise CheckpointError(f"{directory / INDEX} holds no weight_map")
    names = _named(weights)
    others = sorted(set(found) - set(names))
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{directory / INDEX} names {name!r}, which is not a file of the directory")
        if not (directory / name).exists():
            beside = f"; {_listed(others)} lies there instead, which it does not name" if others else ""
            raise CheckpointError(
                f"{directory / name} is missing: {INDEX} names it{beside}. Download it, or the index of what is there"
            )
    if others:
        _note(directory, names, f"{INDEX} names them, and not {_listed(others)}")
    return [directory / name for name in names]


def _named(weight_map: Any) -> list[str]:
    """The files that an index names."""
    if not isinstance(weight_map, dict):
        return []
    return sorted({name for name in weight_map.values() if isinstance(name, str)})


def _note(directory: Path, taken: list[str], why: str) -> None:
    """Say what is taken of files that are at odds."""
    warnings.warn(f"of {directory}, {_listed(taken)} is read: {why}", CheckpointWarning, stacklevel=2)


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _fingerprint(config: Mapping[str, Any], generation: Mapping[str, Any], files: str) -> str:
    text = json.dumps([config, generation, files], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
