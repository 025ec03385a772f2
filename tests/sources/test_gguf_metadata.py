"""GGUF metadata of wrong types, and counts that are lies: one named error, and no memory taken before it."""

from __future__ import annotations

import contextlib
import struct
import tracemalloc
from array import array
from pathlib import Path
from typing import Any

import pytest

from flashrt.arch import family_of
from flashrt.arch.gguf import gguf_config
from flashrt.errors import CheckpointError, FlashrtError
from flashrt.storage.sources import open_checkpoint
from flashrt.storage.sources.gguf_header import MAX_ITEMS, read_gguf_header
from flashrt.text.gguf import text_from_gguf
from tests.families import tiny_gguf

U8, U32, STRING, ARRAY, BOOL = 0, 4, 8, 9, 7
INTEGER, NUMBER, FLAG, TEXT, STRINGS, INTEGERS, NUMBERS = range(7)
KINDS = {
    "general.architecture": TEXT,
    "{}.context_length": INTEGER,
    "{}.embedding_length": INTEGER,
    "{}.block_count": INTEGER,
    "{}.attention.layer_norm_rms_epsilon": NUMBER,
    "{}.attention.head_count": INTEGER,
    "{}.attention.head_count_kv": INTEGER,
    "{}.attention.key_length": INTEGER,
    "{}.attention.value_length": INTEGER,
    "{}.feed_forward_length": INTEGER,
    "{}.rope.dimension_count": INTEGER,
    "{}.rope.freq_base": NUMBER,
    "{}.rope.scaling.type": TEXT,
    "tokenizer.ggml.model": TEXT,
    "tokenizer.ggml.pre": TEXT,
    "tokenizer.ggml.tokens": STRINGS,
    "tokenizer.ggml.merges": STRINGS,
    "tokenizer.ggml.token_type": INTEGERS,
    "tokenizer.ggml.bos_token_id": INTEGER,
    "tokenizer.ggml.eos_token_id": INTEGER,
    "tokenizer.ggml.eot_token_id": INTEGER,
    "tokenizer.ggml.unknown_token_id": INTEGER,
    "tokenizer.ggml.padding_token_id": INTEGER,
    "tokenizer.ggml.add_bos_token": FLAG,
    "tokenizer.chat_template": TEXT,
}
FAMILY_KINDS = {
    "llama": {
        "llama.rope.scale_linear": NUMBER,
        "llama.expert_count": INTEGER,
        "llama.attention.sliding_window": INTEGER,
    },
    "mixtral": {"llama.expert_used_count": INTEGER},
    "qwen3_moe": {
        "qwen3moe.expert_count": INTEGER,
        "qwen3moe.expert_used_count": INTEGER,
        "qwen3moe.expert_feed_forward_length": INTEGER,
    },
    "gemma3": {
        "gemma3.attention.sliding_window": INTEGER,
        "gemma3.attention.sliding_window_pattern": INTEGER,
        "gemma3.rope.freq_base_swa": NUMBER,
    },
}
YARN = {
    "llama.rope.scaling.type": "yarn",
    "llama.rope.scaling.factor": 2.0,
}
YARN_KINDS = {
    "llama.rope.scaling.factor": NUMBER,
    "llama.rope.scaling.yarn_ext_factor": NUMBER,
    "llama.rope.scaling.attn_factor": NUMBER,
    "llama.rope.scaling.original_context_length": INTEGER,
    "llama.rope.scaling.yarn_beta_fast": NUMBER,
    "llama.rope.scaling.yarn_beta_slow": NUMBER,
}
VALUES: tuple[tuple[Any, tuple[int, ...]], ...] = (
    (7, (INTEGER, NUMBER)),
    (7.5, (NUMBER,)),
    (float("nan"), ()),
    (True, (FLAG,)),
    ("seven", (TEXT,)),
    (["a", "b"], (STRINGS,)),
    ([], (STRINGS,)),
    (array("f", [1.0]), (NUMBERS,)),
    (array("B", [7] * 3), (INTEGERS, NUMBERS)),
)


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Family → (metadata, shapes of tensors)."""
    result = {}
    for family in FAMILY_KINDS:
        path = tiny_gguf(family, tmp_path_factory.mktemp(family) / "x.gguf")[1]
        header = read_gguf_header(path)
        result[family] = header.metadata, {name: tensor.shape for name, tensor in header.tensors.items()}
    return result


def read(values: dict[str, Any], shapes: dict[str, Any]) -> None:
    config = gguf_config(values, shapes.get, {})
    family_of(config["model_type"]).spec(config)
    text_from_gguf(values)


@pytest.mark.parametrize("family", FAMILY_KINDS)
def test_values_of_wrong_types_are_named(metadata: dict[str, Any], family: str) -> None:
    values, shapes = metadata[family]
    architecture = values["general.architecture"]
    kinds = {key.format(architecture): kind for key, kind in KINDS.items()} | FAMILY_KINDS[family]
    read(values, shapes)
    for key, kind in kinds.items():
        check_types(values, shapes, key, kind)


def test_values_of_wrong_types_are_named_in_yarn(metadata: dict[str, Any]) -> None:
    values, shapes = metadata["llama"]
    read(values | YARN, shapes)
    for key, kind in YARN_KINDS.items():
        check_types(values | YARN, shapes, key, kind)


def check_types(values: dict[str, Any], shapes: dict[str, Any], key: str, kind: int) -> None:
    for value, fitting in VALUES:
        if kind in fitting:
            continue
        per_layer = key.endswith(("head_count", "head_count_kv", "feed_forward_length", "window_pattern"))
        if per_layer and isinstance(value, array) and value.typecode == "B":
            continue
        with pytest.raises(CheckpointError, match=f"{key} is .*, expected"):
            read(values | {key: value}, shapes)


def test_scores_that_are_no_numbers(metadata: dict[str, Any]) -> None:
    values, shapes = metadata["llama"]
    spelled = values | {"tokenizer.ggml.model": "llama"}
    for value in (["a"], 3, "x"):
        with pytest.raises(CheckpointError, match=r"tokenizer.ggml.scores is .*, expected a list of numbers"):
            read(spelled | {"tokenizer.ggml.scores": value}, shapes)
    with pytest.raises(CheckpointError, match=r"add_space_prefix is 3, expected true or false"):
        read(spelled | {"tokenizer.ggml.add_space_prefix": 3}, shapes)


def test_numbers_that_no_model_has(metadata: dict[str, Any]) -> None:
    """Right types, absurd values: an error, or a spec."""
    values, shapes = metadata["gemma3"]
    for key in values:
        for value in (0, -1, 1 << 63, 1e-300, 1e300, ""):
            with contextlib.suppress(FlashrtError):
                read(values | {key: value}, shapes)


# --- files ---


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def write(path: Path, *entries: bytes, tensors: int = 0, size: int = 0) -> Path:
    """A GGUF file of these metadata entries, `size` bytes long at least."""
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, len(entries)) + b"".join(entries))
    with path.open("r+b") as file:
        file.truncate(max(size, path.stat().st_size, 32))
    return path


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def items(kind: int, count: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + values


def test_a_split_count_that_is_a_text(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", entry("split.count", STRING, text("2")))
    with pytest.raises(CheckpointError, match=r"split.count is '2', expected an integer"):
        open_checkpoint(path)


def test_arrays_stay_as_small_as_they_are_stored(tmp_path: Path) -> None:
    count = 1 << 21
    path = write(tmp_path / "x.gguf", entry("a", ARRAY, items(U8, count, b"\7" * count)))
    tracemalloc.start()
    header = read_gguf_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert header.metadata["a"] == array("B", b"\7" * count)
    assert peak < 4 * count


GIB = 1 << 30
LIES = {
    "bytes": [entry("a", ARRAY, items(U8, 100 << 20))],
    "booleans": [entry("a", ARRAY, items(BOOL, 100 << 20))],
    "strings": [entry("a", ARRAY, items(STRING, 10 << 20))],
    "arrays": [entry("a", ARRAY, items(ARRAY, 50 << 20))],
    "many arrays": [entry("a", ARRAY, items(U8, MAX_ITEMS // 2 + 1, bytes(MAX_ITEMS // 2 + 1)))] * 2,
    "a text": [entry("a", STRING, struct.pack("<Q", GIB // 2))],
    "a key": [struct.pack("<Q", GIB // 2)],
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_counts_are_bounded_before_anything_is_built(lie: list[bytes], tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", *lie, size=GIB)  # a sparse file, large enough for what it says
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=r"damaged"):
        read_gguf_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


def test_tensors_and_their_names_are_bounded(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="counts 1048576 items"):
        read_gguf_header(write(tmp_path / "x.gguf", tensors=1 << 20, size=GIB))
    path = write(tmp_path / "x.gguf", tensors=1)
    path.write_bytes(path.read_bytes()[:24] + struct.pack("<Q", 1 << 20) + bytes(1 << 21))
    with pytest.raises(CheckpointError, match="counts 1048576 items"):
        read_gguf_header(path)
