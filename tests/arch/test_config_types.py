"""Any value in any place of a checkpoint's JSON files: a named error, or a checkpoint; never a traceback."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flashrt.arch import family_of
from flashrt.errors import FlashrtError
from flashrt.storage.sources import open_checkpoint
from tests.families import FAMILIES, tiny_checkpoint

VALUES = (None, True, 0, -1, 3, 1 << 70, 10**400, 1e-300, 1e300, float("nan"), "", "x", [], [[]], [None], {}, {"x": []})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: tiny_checkpoint(family, tmp_path_factory.mktemp(family))[1] for family in FAMILIES}


def places(node: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in items:
        yield (*place, key)
        yield from places(child, (*place, key))


def changed(document: dict[str, Any], place: tuple[Any, ...], value: Any) -> dict[str, Any]:
    result = copy.deepcopy(document)
    node: Any = result
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    return result


# What some configs have and the tiny ones leave out.
OPTIONAL = {
    "rope_theta": 1e4,
    "rope_scaling": {
        "type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
        "attention_factor": 1.0,
        "truncate": True,
    },
    "sliding_window_pattern": 2,
    "layer_types": None,
    "partial_rotary_factor": 1.0,
    "mlp_only_layers": [1],
    "torch_dtype": "float32",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_any_value_in_any_place_of_a_config(saved: dict[str, Path], family: str) -> None:
    config = json.loads((saved[family] / "config.json").read_text())
    model = family_of(config["model_type"])
    for document in (config, {**OPTIONAL, **config}, {**config, **OPTIONAL}):
        for place in places(document):
            for value in VALUES:
                with contextlib.suppress(FlashrtError):
                    spec = model.spec(changed(document, place, value))
                    for attention in set(spec.attentions.values()):  # what is accepted can be computed
                        if attention.rope is not None:
                            attention.rope.inverse_frequencies(attention.head_dim)


TEXT_FILES = {
    "generation_config.json": {"eos_token_id": [1], "temperature": 0.7},
    "special_tokens_map.json": {"bos_token": {"content": "<s>"}, "eos_token": "</s>"},
    "tokenizer_config.json": {
        "bos_token": {"content": "<s>"},
        "add_bos_token": True,
        "chat_template": [{"name": "default", "template": "x"}],
    },
    "chat_template.json": {"chat_template": "x"},
    "model.safetensors.index.json": {"weight_map": {"x": "model.safetensors"}},
}


@pytest.mark.parametrize("name", TEXT_FILES)
def test_any_value_in_any_place_of_the_other_files(saved: dict[str, Path], name: str, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(saved["llama"], tmp_path / "copy"))
    if name == "chat_template.json":
        (directory / "tokenizer_config.json").unlink()
    document = TEXT_FILES[name]
    for place in places(document):
        for value in VALUES:
            (directory / name).write_text(json.dumps(changed(document, place, value)))
            with contextlib.suppress(FlashrtError), open_checkpoint(directory) as checkpoint:
                checkpoint.validate()
                checkpoint.text_files()
