"""Damaged, incomplete and unsupported checkpoints: one clear CheckpointError each, nothing else leaks."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from flashrt.errors import CheckpointError, CheckpointWarning, FlashrtError, UnsupportedModelError
from flashrt.storage.sources import open_checkpoint
from flashrt.storage.sources.gguf_header import read_gguf_header
from flashrt.storage.sources.safetensors_header import MAX_HEADER, read_header
from flashrt.storage.sources.tensors import TensorReader
from tests.families import tiny_checkpoint, tiny_gguf


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("saved"))[1]


@pytest.fixture
def directory(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf("llama", tmp_path_factory.mktemp("gguf") / "tiny.gguf")[1]


def edit_config(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def use(where: Path) -> None:
    """Open, validate, read everything small."""
    with open_checkpoint(where) as checkpoint:
        checkpoint.validate()
        checkpoint.matrix_rows("embed", 0, 5)
        checkpoint.neuron_rows("0.ffn", 0, 0, 5)
        _ = checkpoint.text


# --- directories ---


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "config.json is missing"),
        ("config.json", b"{", "not valid JSON"),
        ("config.json", b"[]", "JSON object"),
        ("config.json", b"{}", "model_type"),
        ("config.json", b"\xff\xfe", "not valid JSON"),
        ("model.safetensors", None, "holds no safetensors"),
        ("model.safetensors", b"", "truncated"),
        ("tokenizer.json", None, "holds no tokenizer: expected tokenizer.json, vocab.json and"),
        ("generation_config.json", b"nonsense", "not valid JSON"),
        ("model.safetensors.index.json", b"{}", "weight_map"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "../x"}}', "not a file of the directory"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "b.safetensors"}}', "is missing"),
    ],
)
def test_files(directory: Path, name: str, content: bytes | None, message: str) -> None:
    (directory / name).unlink(missing_ok=True)
    if name.endswith("index.json"):
        (directory / "model.safetensors").unlink()
    if content is not None:
        (directory / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        use(directory)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "ab" * 32 + "\nsize 4976698672\n"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "tokenizer_config.json"])
def test_git_lfs_pointers_are_named(directory: Path, name: str) -> None:
    (directory / name).write_text(POINTER)
    with pytest.raises(CheckpointError, match=rf"{name} is a git-lfs pointer.*git lfs pull"):
        use(directory)


def test_a_git_lfs_pointer_to_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_text(POINTER)
    with pytest.raises(CheckpointError, match=r"x.gguf is a git-lfs pointer.*git lfs pull"):
        use(tmp_path / "x.gguf")


def test_one_file_of_weights_comes_before_an_index(directory: Path) -> None:
    """As in transformers: an index that was left behind names files that are not used."""
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "other.safetensors"}}))
    (directory / "other.safetensors").write_bytes((directory / "model.safetensors").read_bytes())
    with open_checkpoint(directory) as source:
        source.validate()


def test_a_tensor_in_two_shards(directory: Path) -> None:
    whole = directory / "model.safetensors"
    names = ["model-1.safetensors", "model-2.safetensors"]
    for name in names:
        (directory / name).write_bytes(whole.read_bytes())
    whole.unlink()
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict(zip("ab", names, strict=True))})
    )
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors holds .* again"):
        open_checkpoint(directory)


def test_shards_without_their_index(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    shutil.copy(directory / "model-00001-of-00002.safetensors", directory / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"2 safetensors files.*download model.safetensors.index.json"):
        use(directory)


@pytest.mark.parametrize("with_config", [False, True])
def test_adapters_are_named(directory: Path, with_config: bool) -> None:
    (directory / "adapter_config.json").write_text("{}")
    use(directory)  # a merged model that kept the file
    (directory / "model.safetensors").rename(directory / "adapter_model.safetensors")
    if not with_config:
        (directory / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds an adapter \(LoRA\), not a model: merge it"):
        use(directory)


def test_gguf_adapters_are_named(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_type("adapter")
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.ones((2, 3), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"x.gguf is an adapter \(LoRA\), not a model: merge it"):
        use(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("name", "limit"),
    [("config.json", "32 MiB"), ("generation_config.json", "32 MiB"), ("tokenizer.json", "128 MiB")],
)
def test_files_are_bounded_before_they_are_read(directory: Path, name: str, limit: str) -> None:
    (directory / name).touch()
    os.truncate(directory / name, 1 << 34)
    with pytest.raises(CheckpointError, match=f"{name} has more than {limit}"):
        use(directory)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("tokenizer_config.json", {"additional_special_tokens": 3}, "additional_special_tokens is 3, expected tokens"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}, "added_tokens_decoder is .*, expected tokens"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"7": {"special": 1}}},
            "added token 7 is .*, expected a token",
        ),
        ("tokenizer_config.json", {"bos_token": {"content": "<s>", "lstrip": 1}}, "bos_token is .*, expected flags"),
        ("tokenizer_config.json", {"chat_template": 3}, "chat_template is 3, expected a text"),
        ("generation_config.json", {"eos_token_id": "1"}, "eos_token_id is '1', expected token ids"),
    ],
)
def test_text_settings_of_wrong_types(directory: Path, name: str, fields: dict[str, Any], message: str) -> None:
    (directory / name).write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=message):
        use(directory)


def test_pickles_are_named(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is a pickle.*save_pretrained.*writes safetensors"):
        use(directory)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04" + bytes(40), r"x.bin is a pickle.*save_pretrained"),
        (b"\x80\x02}q\x00." + bytes(40), r"x.bin is a pickle.*save_pretrained"),
        (b"tjgg" + bytes(40), r"older than GGUF"),
        (bytes(40), "not a GGUF file"),
    ],
)
def test_files_of_other_formats_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "x.bin")


@pytest.mark.parametrize("name", ["x.gguf.part1of2", "x.gguf-split-a", "X.GGUF.part-a"])
def test_pieces_of_a_cut_file_are_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(CheckpointError, match=r"is a piece of x.gguf.*join the pieces" if name[0] == "x" else "piece"):
        open_checkpoint(tmp_path / name)


def test_an_index_that_names_other_files_is_explained(directory: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.warns(
        CheckpointWarning, match=r"model.safetensors is read: .*comes before an index.*names model-00001"
    ):
        use(directory)
    (directory / "model.safetensors").rename(directory / "consolidated.safetensors")
    with pytest.raises(
        CheckpointError, match=r"model-00001-of-00002.safetensors is missing.*; consolidated.safetensors"
    ):
        use(directory)
    both = {"weight_map": {"a": "consolidated.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(both))
    shutil.copy(directory / "consolidated.safetensors", directory / "more.safetensors")
    with pytest.warns(
        CheckpointWarning, match=r"consolidated.safetensors is read: .*names them, and not more.safetensors"
    ):
        use(directory)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "mamba"}, "'mamba' is not supported; known: cohere, cohere2, deepseek_v2"),
        ({"model_type": None}, "None is not supported"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization by 'bitsandbytes' is not supported"),
        ({"hidden_act": "xielu"}, "xielu"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "su", "factor": 2.0}}, "su"),
        ({"rope_parameters": {"rope_theta": 1e4, "mrope_section": [1]}}, "mrope"),
        ({"rope_scaling": {"type": "axial", "factor": 2.0}}, "axial"),
        ({"rope_scaling": {"type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"attn_logit_softcapping": 30.0}, "softcapping"),
        ({"head_dim": 21}, "head_dim"),
    ],
)
def test_unsupported_variants(directory: Path, fields: dict[str, Any], message: str) -> None:
    edit_config(directory, **fields)
    with pytest.raises(UnsupportedModelError, match=message):
        use(directory)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": "72"}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_key_value_heads": 4}, "multiple"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps"),
        ({"eos_token_id": ["x"]}, "eos_token_id"),
        ({"rope_parameters": [1]}, "rope"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
        ({"rope_parameters": {"rope_theta": -1.0}}, "rope_theta"),
        ({"tie_word_embeddings": 3}, "tie_word_embeddings"),
        ({"vocab_size": 132}, r"embed_tokens.weight has shape \[131, 72\], expected \[132, 72\]"),
        ({"num_hidden_layers": 4}, "layers.3.input_layernorm.weight is missing; .* more"),
        ({"attention_bias": True}, "q_proj.bias is missing"),
    ],
)
def test_contradictions(directory: Path, fields: dict[str, Any], message: str) -> None:
    edit_config(directory, **fields)
    with pytest.raises(CheckpointError, match=message):
        use(directory)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("opt", {"word_embed_proj_dim": 36}, "word_embed_proj_dim"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before"),
        ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine"),
        ("gemma3", {"use_bidirectional_attention": True}, "bidirectional"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "softcapping"),
        ("qwen2", {"layer_types": ["linear_attention"] * 3}, "linear_attention"),
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window"),
    ],
)
def test_unsupported_variants_of_families(family: str, fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    directory = tiny_checkpoint(family, tmp_path)[1]
    edit_config(directory, **fields)
    with pytest.raises(UnsupportedModelError, match=message):
        use(directory)


def change_tensors(directory: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_every_problem_is_listed(directory: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        del tensors["model.norm.weight"]
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].copy()
        tensors["model.layers.1.mlp.down_proj.weight"] = np.zeros((72, 104), np.int8)

    change_tensors(directory, change)
    with pytest.raises(CheckpointError) as caught:
        use(directory)
    for text in ("model.norm.weight is missing", "expected [131, 72]", "stored as I8"):
        assert text in str(caught.value)


def test_truncated_weights(directory: Path) -> None:
    path = directory / "model.safetensors"
    data = path.read_bytes()
    for keep in (4, 100, 5000, len(data) - 1):
        path.write_bytes(data[:keep])
        with pytest.raises(CheckpointError, match="truncated"):
            use(directory)


def test_file_that_shrinks_while_open(directory: Path) -> None:
    with open_checkpoint(directory) as checkpoint:
        (directory / "model.safetensors").write_bytes(b"")
        with pytest.raises(CheckpointError, match="truncated"):
            checkpoint.vector("norm.final")


def test_out_of_range_reads(directory: Path) -> None:
    with open_checkpoint(directory) as checkpoint:
        for start, stop in ((0, 132), (-1, 3), (5, 5), (131, 132)):
            with pytest.raises(CheckpointError, match="asked for"):
                checkpoint.matrix_rows("embed", start, stop)
        with pytest.raises(CheckpointError, match="asked for"):
            checkpoint.neuron_rows("0.ffn", 0, 100, 105)
        with pytest.raises(CheckpointError, match="not a tensor"):
            checkpoint.matrix_rows("9.qkv", 0, 1)


def test_sharded_checkpoints(saved: Path, tmp_path: Path) -> None:
    from tests.families import tiny_model

    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="60KB")
    shutil.copy(saved / "tokenizer.json", tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists()
    with open_checkpoint(tmp_path) as parts, open_checkpoint(saved) as whole:
        parts.validate()
        np.testing.assert_array_equal(parts.matrix_rows("1.qkv", 0, 200), whole.matrix_rows("1.qkv", 0, 200))
        assert parts.fingerprint != whole.fingerprint


def test_fingerprint_follows_content(directory: Path) -> None:
    with open_checkpoint(directory) as a, open_checkpoint(directory) as b:
        assert a.fingerprint == b.fingerprint
    change_tensors(directory, lambda tensors: tensors.update({"extra": np.zeros(1, np.float32)}))
    with open_checkpoint(directory) as c:
        assert c.fingerprint != a.fingerprint


def test_unknown_places(tmp_path: Path) -> None:
    for name in (tmp_path / "absent", "absent", "a/b/c", "./x"):
        with pytest.raises(CheckpointError, match="does not exist"):
            open_checkpoint(name)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="directory it lies in"):
        open_checkpoint(tmp_path / "model.safetensors")


@pytest.mark.parametrize("kind", ["LocalEntryNotFoundError", "RepositoryNotFoundError", "GatedRepoError", None])
def test_hub_failures_are_explained(kind: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    def fail(*_: Any, **__: Any) -> str:
        if kind is None:
            raise ConnectionError("no route")
        error = getattr(errors, kind)
        raise error.__new__(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    with pytest.raises(CheckpointError, match=r"org/name|gated"):
        open_checkpoint("org/name")


def test_hub_repository_is_opened(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(saved))
    files = [SimpleNamespace(rfilename=path.name) for path in saved.iterdir()]
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: SimpleNamespace(siblings=files))
    with open_checkpoint("org/name") as checkpoint:
        checkpoint.validate()
        assert (checkpoint.name, checkpoint.source) == ("name", "Hugging Face hub org/name")


# --- safetensors headers ---


def write_safetensors(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": {}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}',
        b'{"a": {"dtype": "F32", "shape": [99999999999999999999], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": 3, "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [NaN, 4]}}',
        b"[" * 100_000,
        b"\xff\xff",
    ],
)
def test_malformed_headers(header: bytes, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        read_header(write_safetensors(tmp_path / "x.safetensors", header, b"12345678"))


def test_header_length_is_bounded_before_anything_is_read(tmp_path: Path) -> None:
    for length in (9, 1 << 40, (1 << 64) - 1):
        with pytest.raises(CheckpointError, match="truncated"):
            read_header(write_safetensors(tmp_path / "x.safetensors", b"{}", length=length))


def test_a_huge_header_is_not_read(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "x.safetensors", b"{}", length=MAX_HEADER + 1)
    os.truncate(path, 1 << 30)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=f"header of {MAX_HEADER + 1} bytes"):
        read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_unknown_dtype_matters_only_when_needed(tmp_path: Path) -> None:
    header = b'{"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}'
    tensors, _ = read_header(write_safetensors(tmp_path / "x.safetensors", header, b"1234"))
    with pytest.raises(CheckpointError, match="F8_E4M3"):
        TensorReader(tensors).vector("a")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
_ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F64", "I8", "?"]) | _JSON,
        "shape": st.lists(st.integers(-2, 40), max_size=4) | _JSON,
        "data_offsets": st.lists(st.integers(-2, 80), min_size=2, max_size=2) | _JSON,
    }
)


@given(header=st.dictionaries(st.text(max_size=4), _ENTRY | _JSON, max_size=3), data=st.binary(max_size=64))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_header_is_read_or_refused(header: dict[str, Any], data: bytes, tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "x.safetensors", json.dumps(header).encode(), data)
    try:
        tensors, _ = read_header(path)
    except CheckpointError:
        return
    reader = TensorReader(tensors)
    for name, tensor in tensors.items():
        assert tensor.offset + tensor.nbytes <= path.stat().st_size
        if tensor.codec is not None:
            assert reader.vector(name).size == np.prod(tensor.shape)
    reader.close()


@given(data=st.binary(max_size=200))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(data)
    with pytest.raises(CheckpointError):
        read_gguf_header(path)
    if data[:8] != struct.pack("<Q", 2) or data[8:10] != b"{}":
        with pytest.raises(CheckpointError):
            read_header(path)


# --- GGUF ---


def test_gguf_cut_short_anywhere(gguf_file: Path, tmp_path: Path) -> None:
    data = gguf_file.read_bytes()
    cut = tmp_path / "cut.gguf"
    for keep in [*range(0, 200, 7), *range(200, len(data), len(data) // 60), len(data) - 40]:
        cut.write_bytes(data[:keep])
        with pytest.raises(CheckpointError, match=r"truncated|damaged|not a GGUF"):
            use(cut)


@given(edits=st.lists(st.tuples(st.integers(0, 6000), st.integers(0, 255)), min_size=1, max_size=6))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_gguf_with_changed_bytes_leaks_nothing(edits: list[tuple[int, int]], gguf_file: Path, tmp_path: Path) -> None:
    data = bytearray(gguf_file.read_bytes())
    for position, value in edits:
        data[position] = value
    path = tmp_path / "changed.gguf"
    path.write_bytes(data)
    with contextlib.suppress(FlashrtError):
        use(path)


def test_gguf_versions_and_kinds(gguf_file: Path, tmp_path: Path) -> None:
    data, path = bytearray(gguf_file.read_bytes()), tmp_path / "x.gguf"
    data[4] = 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="version 1"):
        use(path)
    path.write_bytes(b"ggml" + data[4:])
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        use(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("general.architecture", "mamba", "mamba"),
        ("llama.rope.scaling.type", "dynamic", "dynamic"),
        ("llama.attention.clamp_kqv", 3.0, "clamp_kqv"),
        ("llama.rope.dimension_count", 10, "dimension_count"),
        ("tokenizer.ggml.pre", "nobodys", "nobodys"),
        ("tokenizer.ggml.model", "t5", "t5"),
    ],
)
def test_unsupported_gguf(key: str, value: Any, message: str, gguf_file: Path) -> None:
    from flashrt.arch import family_of
    from flashrt.arch.gguf import gguf_config
    from flashrt.text.gguf import text_from_gguf

    header = read_gguf_header(gguf_file)
    metadata = {**header.metadata, key: value}
    shapes = {name: tensor.shape for name, tensor in header.tensors.items()}

    def read() -> None:
        family_of("llama").spec(gguf_config(metadata, shapes.get, {}))
        text_from_gguf(metadata)

    with pytest.raises(UnsupportedModelError, match=message):
        read()
