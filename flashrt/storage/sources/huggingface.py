"""A checkpoint as transformers writes it: a directory of safetensors files, config.json and tokenizer files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flashrt.arch import TensorMap, family_of
from flashrt.arch.config import Config
from flashrt.errors import CheckpointError, UnsupportedModelError
from flashrt.spec import ModelSpec
from flashrt.storage.sources.checkpoint import Checkpoint
from flashrt.storage.sources.files import MAX_JSON, MAX_TOKENIZER, MERGE_ADAPTER, read_file
from flashrt.storage.sources.safetensors_header import read_header
from flashrt.storage.sources.tensors import StoredTensor, TensorReader
from flashrt.text.bpe import gpt2_files
from flashrt.text.files import GENERATION_KEYS, TextFiles

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"


def open_directory(directory: Path, name: str | None = None, source: str | None = None) -> Checkpoint:
    """Open a directory; see `open_checkpoint` for what is read. Raises CheckpointError."""
    _refuse_adapter(directory)
    config = _json(directory / "config.json")
    if "model_type" not in config:
        raise CheckpointError(f"{directory / 'config.json'} names no model_type")
    family = family_of(config["model_type"])
    if config.get("quantization_config") is not None:
        method = config["quantization_config"]
        method = method.get("quant_method") if isinstance(method, dict) else method
        raise UnsupportedModelError(f"{directory} is quantized ({method}): use the original checkpoint, or a GGUF file")
    generation = _json(directory / "generation_config.json", required=False)
    spec = _with_end_tokens(family.spec(config), generation)
    tensors, digest = _tensors(directory)
    reader = TensorReader(tensors)
    spec = _with_stored_head(spec, family.tensors(spec, tensors.__contains__), reader)
    return Checkpoint(
        spec=spec,
        name=name or directory.resolve().name,
        source=source or f"Hugging Face checkpoint {directory}",
        fingerprint=_fingerprint(config, generation, digest),
        reader=reader,
        tensor_map=family.tensors(spec, tensors.__contains__),
        text=lambda: _text(directory, generation),
    )


def _refuse_adapter(directory: Path) -> None:
    if (directory / ADAPTER).exists() and not any((directory / name).exists() for name in (SINGLE, INDEX)):
        raise CheckpointError(f"{directory} holds an adapter (LoRA), not a model: {MERGE_ADAPTER}")


def _json(path: Path, required: bool = True) -> dict[str, Any]:
    try:
        value = json.loads(read_file(path, MAX_JSON))
    except FileNotFoundError:
        if required:
            raise CheckpointError(f"{path} is missing: this is not a complete Hugging Face checkpoint") from None
        return {}
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return value


def _with_end_tokens(spec: ModelSpec, generation: Mapping[str, Any]) -> ModelSpec:
    """generation_config.json knows more end tokens than config.json (a chat model's end of turn)."""
    found = Config(generation, "generation").token_ids("eos_token_id")
    return replace(spec, eos=tuple(dict.fromkeys([*found, *spec.eos])))


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
    if (directory / SINGLE).exists():  # beside an index too, as transformers decides it
        return [directory / SINGLE]
    if (directory / INDEX).exists():
        return _indexed_files(directory)
    found = sorted(directory.glob("*.safetensors"))
    if len(found) == 1:
        return found
    if found:
        raise CheckpointError(
            f"{directory} holds {len(found)} safetensors files, but not the index of them: download {INDEX} too"
        )
    other = next((p.name for p in sorted(directory.glob("*")) if p.suffix in (".bin", ".pt", ".pth")), None)
    hint = f"{other} is a pickle, which is not read: convert it to safetensors" if other else f"expected {SINGLE}"
    raise CheckpointError(f"{directory} holds no safetensors weights: {hint}")


def _indexed_files(directory: Path) -> list[Path]:
    weights = _json(directory / INDEX).get("weight_map")
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights.values()):
        raise CheckpointError(f"{directory / INDEX} holds no weight_map")
    names = sorted(set(weights.values()))
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{directory / INDEX} names {name!r}, which is not a file of the directory")
        if not (directory / name).exists():
            raise CheckpointError(f"{directory / name} is missing: {INDEX} names it")
    return [directory / name for name in names]


def _fingerprint(config: Mapping[str, Any], generation: Mapping[str, Any], files: str) -> str:
    text = json.dumps([config, generation, files], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _text(directory: Path, generation: Mapping[str, Any]) -> TextFiles:
    try:
        return _text_files(directory, generation)
    except OSError as error:
        raise CheckpointError(f"cannot read {error.filename or directory}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{directory} holds a template or merges that are not UTF-8 text: {error}") from error


def _text_files(directory: Path, generation: Mapping[str, Any]) -> TextFiles:
    config = _json(directory / "tokenizer_config.json", required=False)
    special = _special_tokens({**_json(directory / "special_tokens_map.json", required=False), **config})
    add_bos = config.get("add_bos_token")
    if not isinstance(add_bos, bool | None):
        raise CheckpointError(f"{directory}: add_bos_token is {add_bos!r:.80}, expected true or false")
    return TextFiles(
        _tokenizer_json(directory, config, special),
        _chat_template(directory, config),
        special,
        {key: generation[key] for key in GENERATION_KEYS if generation.get(key) is not None},
        add_bos,
    )


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    result = {}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = config.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            result[key] = value
    return result


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.exists():
        return read_file(path, MAX_JSON).decode()
    found = config.get("chat_template")
    if found is None:
        found = _json(directory / "chat_template.json", required=False).get("chat_template")
    if isinstance(found, list):  # several named templates
        named = [entry for entry in found if isinstance(entry, dict) and entry.get("name") == "default"]
        found = named[-1].get("template") if named else None
    if not isinstance(found, str | None):
        raise CheckpointError(f"{directory}: chat_template is {found!r:.80}, expected a text")
    return found


def _tokenizer_json(directory: Path, config: Mapping[str, Any], special: Mapping[str, str]) -> bytes:
    path = directory / "tokenizer.json"
    if path.exists():
        return read_file(path, MAX_TOKENIZER)
    if (directory / "vocab.json").exists() and (directory / "merges.txt").exists():
        vocab = _json(directory / "vocab.json")
        if not all(type(index) is int for index in vocab.values()):
            raise CheckpointError(f"{directory / 'vocab.json'} is damaged: not every token has a number")
        merges = read_file(directory / "merges.txt", MAX_JSON).decode()
        return gpt2_files(vocab, merges, {token: vocab[token] for token in special.values() if token in vocab})
    raise CheckpointError(f"{directory} holds no tokenizer.json (nor vocab.json and merges.txt)")
