"""Configs as older and newer versions of transformers write them, and as published models have them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flashrt.arch import family_of
from flashrt.arch.gguf import llama3_parameters
from flashrt.errors import CheckpointError, UnsupportedModelError
from flashrt.rope import Rope
from flashrt.storage.sources import open_checkpoint
from tests.arch.test_forward import check
from tests.families import tiny_checkpoint
from tests.sources.test_checkpoint import check_equal

LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def rope_of(**fields: Any) -> Rope:
    rope = family_of("llama").spec({**LLAMA, **fields}).layers[0].attention.rope
    assert rope is not None
    return rope


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"head_dim": 514}, "heads of 514 numbers are wider than the 512"),
        ({"hidden_size": 1 << 17, "head_dim": 128}, "a hidden size of 131072"),
        ({"num_attention_heads": 1024, "head_dim": 128}, "1024 heads of 128"),
    ],
)
def test_what_kernels_cannot_compute_is_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"this llama model is not supported: {reason}"):
        family_of("llama").spec({**LLAMA, **fields})


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "llama3", **LLAMA3},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        {"rope_type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 16, "truncate": False},
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5},
    ],
)
def test_old_and_new_rope_fields_and_transformers_frequencies(scaling: dict[str, Any]) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    old = rope_of(rope_theta=500000.0, rope_scaling=scaling)
    older = {("type" if key == "rope_type" else key): value for key, value in scaling.items()}
    assert rope_of(rope_theta=500000.0, rope_scaling=older) == old
    assert rope_of(rope_parameters={"rope_theta": 500000.0, **scaling}) == old
    config = LlamaConfig(**{**LLAMA, "rope_parameters": {"rope_theta": 500000.0, **scaling}})
    frequencies, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, "cpu")
    np.testing.assert_allclose(old.inverse_frequencies(128), frequencies.numpy(), rtol=2e-6)
    assert math.isclose(old.attention_factor, factor, rel_tol=1e-9)


def test_default_theta() -> None:
    assert rope_of() == Rope(10000.0)
    mixtral = family_of("mixtral").spec({**LLAMA, "num_local_experts": 4})
    assert mixtral.layers[0].attention.rope == Rope(1e6)


@pytest.mark.parametrize(
    ("factor", "theta", "dims", "context"), [(8.0, 5e5, 64, 8192), (32.0, 5e5, 32, 8192), (4.0, 1e3, 8, 96)]
)
def test_llama3_parameters_are_recognised(factor: float, theta: float, dims: int, context: int) -> None:
    rope = Rope(theta, "llama3", factor, context, low_freq_factor=1.0, high_freq_factor=4.0)
    plain = np.array(Rope(theta).inverse_frequencies(2 * dims))
    factors = (plain / np.array(rope.inverse_frequencies(2 * dims))).astype(np.float32).tolist()
    found = llama3_parameters(factors, theta)
    parsed = Rope(theta, "llama3", found["factor"], found["original_max_position_embeddings"], found["low_freq_factor"])
    np.testing.assert_allclose(parsed.inverse_frequencies(2 * dims), rope.inverse_frequencies(2 * dims), rtol=1e-5)


def test_other_rope_factors_are_refused() -> None:
    assert llama3_parameters([1.0] * 8, 1e4) == {}
    step = [1.0 if 2 * math.pi * 5e5 ** (i / 64) < 8192 else 16.0 for i in range(64)]  # of Llama 4 Scout
    found = llama3_parameters(step, 5e5)
    assert (found["factor"], found["low_freq_factor"], found["high_freq_factor"]) == (16.0, 1.0, 1.0)
    assert found["original_max_position_embeddings"] == 8192
    with pytest.raises(UnsupportedModelError, match="rope_freqs"):
        llama3_parameters([1.0, 2.0, 1.5, 8.0], 1e4)


def test_gemma_as_published() -> None:
    """The multimodal 4B config leaves out everything that equals a default."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    config = {"model_type": "gemma3", "text_config": text, "torch_dtype": "bfloat16", "eos_token_id": [1, 106]}
    spec = family_of("gemma3").spec(config)
    attentions = [layer.attention for layer in spec.layers]
    assert [i for i, a in enumerate(attentions) if a.window is None] == [5, 11, 17, 23, 29]
    assert attentions[5].rope == Rope(1e6, "linear", 8.0)
    assert attentions[4].rope == Rope(1e4)
    assert (attentions[4].window, attentions[4].heads, attentions[4].kv_heads) == (1024, 8, 4)
    assert (spec.vocab, spec.context, spec.eos, spec.tied) == (262208, 131072, (1, 106), True)
    assert spec.embed_scale == 50.5  # sqrt(2560) = 50.596 as a bfloat16


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "silu"),
        ({"hidden_act": "relu"}, "relu"),
        ({"hidden_act": "relu2"}, "relu2"),
        ({"hidden_act": "fatrelu", "hidden_act_param": 0.01}, "fatrelu:0.01"),
        ({"hidden_act": "silu", "hidden_act_param": 0.03}, "silu"),
    ],
)
def test_activations_of_relufied_llamas(fields: dict[str, Any], expected: str) -> None:
    assert family_of("llama").spec({**LLAMA, **fields}).layers[0].ffn.activation == expected


@pytest.mark.parametrize(
    ("fields", "error", "reason"),
    [
        ({"hidden_act": "fatrelu"}, CheckpointError, "hidden_act_param is None"),
        ({"hidden_act": "fatrelu", "hidden_act_param": -0.01}, CheckpointError, "hidden_act_param is -0.01"),
        ({"hidden_act": "shiftrelu", "hidden_act_param": 0.1}, UnsupportedModelError, "activation 'shiftrelu'"),
    ],
)
def test_activations_that_are_refused(fields: dict[str, Any], error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        family_of("llama").spec({**LLAMA, **fields})


def test_mistral_windows() -> None:
    spec = family_of("mistral").spec
    assert spec(LLAMA).layers[0].attention.window == 4096
    assert spec({**LLAMA, "sliding_window": None}).layers[0].attention.window is None
    mixed = spec({**LLAMA, "sliding_window": 9, "layer_types": ["full_attention", "sliding_attention"]})
    assert [layer.attention.window for layer in mixed.layers] == [None, 9]


def test_qwen3_moe_sparse_layers() -> None:
    config = {
        **LLAMA,
        "num_hidden_layers": 6,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
        "moe_intermediate_size": 64,
        "num_local_experts": 16,
        "num_experts_per_tok": 4,
    }
    spec = family_of("qwen3_moe").spec(config)
    assert [layer.ffn.experts for layer in spec.layers] == [0, 16, 0, 0, 0, 16]
    assert not spec.layers[1].ffn.normalize_router


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_multimodal_gemma_names(prefix: str, tmp_path: Path) -> None:
    model, directory = tiny_checkpoint("gemma3", tmp_path)
    tensors = load_file(directory / "model.safetensors")
    renamed = {prefix + name.removeprefix("model."): value for name, value in tensors.items()}
    save_file({**renamed, "vision_tower.x": np.zeros(3, np.float32)}, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": config}))
    with open_checkpoint(directory) as checkpoint:
        checkpoint.validate()
        check(checkpoint, model)


def rewrite(directory: Path, tensors: dict[str, np.ndarray]) -> None:
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("family", "router"), [("mixtral", "block_sparse_moe"), ("mixtral", "mlp"), ("qwen3_moe", "mlp")]
)
def test_fused_experts(family: str, router: str, tmp_path: Path) -> None:
    """Experts stacked in one tensor, gate and up fused: how transformers 5 holds them in memory."""
    model, directory = tiny_checkpoint(family, tmp_path, seed=9)
    tensors = load_file(directory / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if ".experts." not in name}
    kept = {name.replace("block_sparse_moe", router): value for name, value in kept.items()}
    stacked = {name: value.numpy() for name, value in model.state_dict().items() if ".experts." in name}
    rewrite(directory, kept | stacked)
    with open_checkpoint(directory) as checkpoint:
        checkpoint.validate()
        check_equal(checkpoint, family, model)


def test_bare_decoder_without_prefix(tmp_path: Path) -> None:
    model, directory = tiny_checkpoint("qwen2-window", tmp_path)
    tensors = load_file(directory / "model.safetensors")
    rewrite(directory, {name.removeprefix("model."): value for name, value in tensors.items()})
    with open_checkpoint(directory) as checkpoint:
        checkpoint.validate()
        check_equal(checkpoint, "qwen2-window", model)


def test_nothing_heavy_is_imported() -> None:
    """Reading configs needs nothing but the standard library, opening checkpoints neither torch nor transformers."""
    code = (
        "import sys, flashrt.arch; assert 'numpy' not in sys.modules; "
        "import flashrt.storage.sources, flashrt.text.tokenizer, flashrt.text.template; "
        "heavy = {'torch', 'transformers', 'gguf', 'huggingface_hub', 'tokenizers', 'jinja2'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
