"""No tensor of a checkpoint is dropped in silence: it is used, it is on the list of harmless ones, or it is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from flashrt.errors import CheckpointError, UnsupportedModelError
from flashrt.storage.sources import open_checkpoint
from tests import latents
from tests.arch.test_forward import check
from tests.families import FAMILIES, GGUF_FAMILIES, GGUF_FIELDS, HYBRIDS, tiny_checkpoint, tiny_gguf
from tests.sources.test_checkpoint import check_equal

UNKNOWN_HF = (
    "model.layers.0.mlp.gate_proj.scale",
    "model.layers.0.self_attn.q_proj.weight_scale_2",
    "model.layers.9.input_layernorm.weight",
    "lm_head.bias",
    "anything",
)
HARMLESS_HF = (
    "model.layers.0.self_attn.rotary_emb.inv_freq",
    "model.rotary_emb.cos_cached",
    "model.position_ids",
    "decoder.version",
    "vision_tower.vision_model.embeddings.position_ids",
    "model.vision_tower.x.weight",
    "multi_modal_projector.x.weight",
    "mtp.layers.0.input_layernorm.weight",
    "model.mtp_layers.0.x.weight",
)
UNKNOWN_GGUF = (
    "blk.0.ffn_up.scale",
    "blk.0.attn_sub_norm.weight",
    "blk.1.attn_q.scale",
    "blk.9.attn_norm.weight",
    "output.bias",
    "rope_factors_other.weight",
)
HARMLESS_GGUF = ("blk.0.attn_rot_embd", "blk.1.attn_rot_embd.weight", "v.blk.0.attn_q.weight", "mm.input.weight")


def extra(*names: str) -> dict[str, np.ndarray]:
    return {name: np.full(3, 0.5, np.float32) for name in names}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: tiny_checkpoint(family, tmp_path_factory.mktemp(family))[1] for family in FAMILIES}


def with_tensors(directory: Path, tmp_path: Path, tensors: dict[str, np.ndarray]) -> Path:
    copy = Path(shutil.copytree(directory, tmp_path / "copy", dirs_exist_ok=True))
    save_file(load_file(directory / "model.safetensors") | tensors, copy / "model.safetensors")
    return copy


@pytest.mark.parametrize("family", FAMILIES)
def test_unknown_tensors_of_a_directory_are_refused(saved: dict[str, Path], family: str, tmp_path: Path) -> None:
    for name in UNKNOWN_HF:
        directory = with_tensors(saved[family], tmp_path, extra(name, *HARMLESS_HF))
        with (
            open_checkpoint(directory) as checkpoint,
            pytest.raises(UnsupportedModelError, match=rf"does not use 1 of its tensors.*: {name}$"),
        ):
            checkpoint.validate()


@pytest.mark.parametrize("family", FAMILIES)
def test_harmless_tensors_of_a_directory_are_accepted(saved: dict[str, Path], family: str, tmp_path: Path) -> None:
    with open_checkpoint(with_tensors(saved[family], tmp_path, extra(*HARMLESS_HF))) as checkpoint:
        checkpoint.validate()


@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_unknown_tensors_of_a_gguf_file_are_refused(family: str, tmp_path: Path) -> None:
    for name in UNKNOWN_GGUF:
        tensors = extra(name, *HARMLESS_GGUF)
        path = tiny_gguf(family, tmp_path / "x.gguf", extra=tensors, **GGUF_FIELDS.get(family, {}))[1]
        with (
            open_checkpoint(path) as checkpoint,
            pytest.raises(UnsupportedModelError, match=rf"does not use 1 of its tensors.*: {name}$"),
        ):
            checkpoint.validate()


@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_harmless_tensors_of_a_gguf_file_are_accepted(family: str, tmp_path: Path) -> None:
    path = tiny_gguf(family, tmp_path / "x.gguf", extra=extra(*HARMLESS_GGUF), **GGUF_FIELDS.get(family, {}))[1]
    with open_checkpoint(path) as checkpoint:
        checkpoint.validate()


def test_the_first_of_many_are_named(saved: dict[str, Path], tmp_path: Path) -> None:
    directory = with_tensors(saved["llama"], tmp_path, extra(*(f"x{i}" for i in range(9))))
    with (
        open_checkpoint(directory) as checkpoint,
        pytest.raises(UnsupportedModelError, match=r"9 of its tensors.*: x0; x1; x2; x3; x4; and 4 more$"),
    ):
        checkpoint.validate()


@pytest.mark.parametrize("projections", [("q_proj", "k_proj", "v_proj"), ("o_proj",)])
@pytest.mark.parametrize("family", sorted({*GGUF_FAMILIES} - {*HYBRIDS, *latents.FAMILIES}))
def test_attention_biases_of_a_gguf_file_count(family: str, projections: tuple[str, ...], tmp_path: Path) -> None:
    """llama.cpp adds the biases that a file holds, whatever its family."""

    def add_biases(model: Any) -> None:
        generator = torch.Generator().manual_seed(8)
        for layer in model.model.layers:
            fused = len(projections) == 3 and hasattr(layer.self_attn, "qkv_proj")
            for name in ("qkv_proj",) if fused else projections:
                if (linear := getattr(layer.self_attn, name, None)) is None:  # Gemma 4: values that are keys
                    continue
                noise = torch.randn(linear.out_features, generator=generator)
                linear.bias = torch.nn.Parameter(noise, requires_grad=False)

    model, path = tiny_gguf(family, tmp_path / "x.gguf", 2, change=add_biases, **GGUF_FIELDS.get(family, {}))
    with open_checkpoint(path) as checkpoint:
        checkpoint.validate()
        check_equal(checkpoint, family, model)
        check(checkpoint, model)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "granite", "olmo2"])
def test_feed_forward_biases_of_a_gguf_file_count(family: str, tmp_path: Path) -> None:
    def add_biases(model: Any) -> None:
        generator = torch.Generator().manual_seed(8)
        for layer in model.model.layers:
            for name in ("gate_proj", "up_proj", "down_proj"):
                linear = getattr(layer.mlp, name)
                linear.bias = torch.nn.Parameter(torch.randn(linear.out_features, generator=generator), False)

    model, path = tiny_gguf(family, tmp_path / "x.gguf", 2, change=add_biases, **GGUF_FIELDS.get(family, {}))
    with open_checkpoint(path) as checkpoint:
        checkpoint.validate()
        assert all(layer.ffn.gate_bias for layer in checkpoint.spec.layers)
        check(checkpoint, model)


@pytest.mark.parametrize("name", ["gate", "up", "down"])
def test_one_of_the_feed_forward_biases_is_refused(name: str, tmp_path: Path) -> None:
    path = tiny_gguf("llama", tmp_path / "x.gguf", extra={f"blk.1.ffn_{name}.bias": np.ones(72, np.float32)})[1]
    with (
        open_checkpoint(path) as checkpoint,
        pytest.raises(CheckpointError, match=r"ffn_\w+.bias (is missing|has)"),
    ):
        checkpoint.validate()


def test_biases_beside_an_output_gate_are_refused(tmp_path: Path) -> None:
    """llama.cpp does not add them."""
    path = tiny_gguf("qwen3_5_text", tmp_path / "x.gguf", extra={"blk.2.attn_output.bias": np.ones(72, np.float32)})[1]
    with open_checkpoint(path) as checkpoint, pytest.raises(UnsupportedModelError, match=r"1 of its tensors.*attn_out"):
        checkpoint.validate()


def test_half_of_the_attention_biases_is_refused(tmp_path: Path) -> None:
    path = tiny_gguf("llama", tmp_path / "x.gguf", extra={"blk.1.attn_k.bias": np.ones(40, np.float32)})[1]
    with open_checkpoint(path) as checkpoint, pytest.raises(CheckpointError, match=r"blk.1.attn_q.bias is missing"):
        checkpoint.validate()


@pytest.mark.parametrize("count", [9, 11, 1 << 20])
def test_rope_factors_of_another_head_are_refused(count: int, tmp_path: Path) -> None:
    factors = {"rope_freqs.weight": np.ones(count, np.float32)}
    path = tiny_gguf("llama", tmp_path / "x.gguf", extra=factors)[1]
    with pytest.raises(CheckpointError, match=r"rope_freqs"):
        open_checkpoint(path)


@pytest.mark.parametrize("shape", [(1, 0, 0), (0, 2, 0), (0, 0, 1), (-1, 0, 0)])
def test_a_stack_of_experts_is_used_whole(saved: dict[str, Path], shape: tuple[int, ...], tmp_path: Path) -> None:
    experts, rows, columns = (a + b for a, b in zip((5, 80, 72), shape, strict=True))
    tensors = load_file(saved["mixtral"] / "model.safetensors")
    directory = Path(shutil.copytree(saved["mixtral"], tmp_path / "copy"))
    kept = {name: values for name, values in tensors.items() if ".experts." not in name}
    for i in range(3):
        kept[f"model.layers.{i}.mlp.experts.gate_up_proj"] = np.ones((experts, rows, columns), np.float32)
        kept[f"model.layers.{i}.mlp.experts.down_proj"] = np.ones((5, 72, 40), np.float32)
    save_file(kept, directory / "model.safetensors")
    with (
        open_checkpoint(directory) as checkpoint,
        pytest.raises(CheckpointError, match=r"gate_up_proj has shape .*, expected \[5, 80, 72\]"),
    ):
        checkpoint.validate()


# --- a head beside a config that says tied ---

TIED = ("llama-bias", "qwen2-window", "gemma3", "opt")


def transformers_model(directory: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def embedding_of(directory: Path) -> tuple[str, np.ndarray]:
    tensors = load_file(directory / "model.safetensors")
    assert "lm_head.weight" not in tensors
    return next((name, values) for name, values in tensors.items() if name.endswith("embed_tokens.weight"))


@pytest.mark.parametrize("family", TIED)
def test_a_stored_head_that_differs_is_used(saved: dict[str, Path], family: str, tmp_path: Path) -> None:
    head = embedding_of(saved[family])[1].copy()
    head[-1, -1] += 3  # the last number of all
    directory = with_tensors(saved[family], tmp_path, {"lm_head.weight": head})
    with open_checkpoint(directory) as checkpoint:
        checkpoint.validate()
        assert not checkpoint.spec.tied
        np.testing.assert_array_equal(checkpoint.matrix_rows("head", 0, len(head)), head)
        check(checkpoint, transformers_model(directory))


@pytest.mark.parametrize("family", TIED)
def test_a_stored_head_that_equals_the_embedding_is_the_embedding(
    saved: dict[str, Path], family: str, tmp_path: Path
) -> None:
    directory = with_tensors(saved[family], tmp_path, {"lm_head.weight": embedding_of(saved[family])[1]})
    with open_checkpoint(directory) as checkpoint:
        checkpoint.validate()
        assert checkpoint.spec.tied
        check(checkpoint, transformers_model(directory))


@pytest.mark.parametrize("family", TIED)
def test_tied_weights_stored_as_the_head(saved: dict[str, Path], family: str, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(saved[family], tmp_path / "copy"))
    tensors = load_file(directory / "model.safetensors")
    name, embedding = embedding_of(directory)
    tensors["lm_head.weight"] = tensors.pop(name)
    save_file(tensors, directory / "model.safetensors")
    with open_checkpoint(directory) as checkpoint:
        checkpoint.validate()
        assert checkpoint.spec.tied
        np.testing.assert_array_equal(checkpoint.matrix_rows("embed", 0, len(embedding)), embedding)
        check(checkpoint, transformers_model(directory))


def test_a_stored_head_of_another_shape_is_refused(saved: dict[str, Path], tmp_path: Path) -> None:
    directory = with_tensors(saved["llama-bias"], tmp_path, {"lm_head.weight": np.ones((130, 72), np.float32)})
    with open_checkpoint(directory) as checkpoint, pytest.raises(CheckpointError, match=r"lm_head.weight has shape"):
        checkpoint.validate()


def test_gemma_that_is_not_tied(saved: dict[str, Path], tmp_path: Path) -> None:
    head = np.random.default_rng(1).standard_normal(embedding_of(saved["gemma3"])[1].shape).astype(np.float32)
    directory = with_tensors(saved["gemma3"], tmp_path, {"lm_head.weight": head})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with open_checkpoint(directory) as checkpoint:
        checkpoint.validate()
        check(checkpoint, transformers_model(directory))
