"""Logical tensors of every family against transformers' parameters, from both formats."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flashrt.storage.sources import Checkpoint, open_checkpoint
from tests import latents
from tests.families import FAMILIES, GGUF_FAMILIES, GGUF_FIELDS, HYBRIDS, stored_buffers, tiny_checkpoint, tiny_gguf
from tests.hybrids import expected_mixer

_ATTENTION = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm", "out": "self_attn.{out}"}
_NORMS = {"norm.attention": "input_layernorm", "norm.ffn": "post_attention_layernorm"}
_GEMMA_NORMS = {
    "norm.attention": "input_layernorm",
    "norm.attention_post": "post_attention_layernorm",
    "norm.ffn": "pre_feedforward_layernorm",
    "norm.ffn_post": "post_feedforward_layernorm",
}
_OTHER_NORMS = {
    "gemma2": _GEMMA_NORMS,
    "gemma3": _GEMMA_NORMS,
    "gemma4": _GEMMA_NORMS,
    "gemma4_unified": _GEMMA_NORMS,
    "gemma4-inputs": {**_GEMMA_NORMS, "norm.input_post": "post_per_layer_input_norm"},
    "gemma4-experts": {
        **_GEMMA_NORMS,
        "norm.shared_post": "post_feedforward_layernorm_1",
        "norm.experts": "pre_feedforward_layernorm_2",
        "norm.experts_post": "post_feedforward_layernorm_2",
    },
    "cohere": {"norm.attention": "input_layernorm"},
    "cohere2": {"norm.attention": "input_layernorm"},
    "olmo2": {"norm.attention_post": "post_attention_layernorm", "norm.ffn_post": "post_feedforward_layernorm"},
    "olmo3": {"norm.attention_post": "post_attention_layernorm", "norm.ffn_post": "post_feedforward_layernorm"},
    "glm4": {
        **_NORMS,
        "norm.attention_post": "post_self_attn_layernorm",
        "norm.ffn_post": "post_mlp_layernorm",
    },
}
_OPT_NORMS = {"norm.attention": "self_attn_layer_norm", "norm.ffn": "final_layer_norm"}


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().numpy()


def _halves(parts: list[torch.Tensor], attention: Any, rotary: int) -> torch.Tensor:
    """Queries, keys and values; of heads whose neighbours are rotated against each other the even rows first."""
    result = []
    for i, part in enumerate(parts):
        heads = part.unflatten(0, (-1, attention.head_dim)) if rotary else part[None]
        pairs, rest = heads[:, :rotary], heads[:, rotary:]
        joined = torch.cat([pairs[:, 0::2], pairs[:, 1::2], rest], 1).flatten(0, 1)
        result.append(part if i == 2 else joined)
    return torch.cat(result)


def expected_tensors(family: str, model: Any, tiled: bool) -> dict[str, np.ndarray]:
    """Logical vectors and matrices as the model itself holds them."""
    decoder = model.model.decoder if family == "opt" else model.model
    final = decoder.final_layer_norm if family == "opt" else decoder.norm
    add = 1.0 if family in ("gemma2", "gemma3", *HYBRIDS) else 0.0
    norms = _OPT_NORMS if family == "opt" else _OTHER_NORMS.get(family, _NORMS)
    result = {"embed": decoder.embed_tokens.weight, "norm.final": final.weight + add, "head": model.lm_head.weight}
    if family == "opt":
        result |= {"positions": decoder.embed_positions.weight, "norm.final.bias": final.bias}
    if hasattr(decoder, "embed_tokens_per_layer"):
        result |= {"inputs.embed": decoder.embed_tokens_per_layer.weight}
        result |= {"inputs.project": decoder.per_layer_model_projection.weight}
        result |= {"norm.inputs": decoder.per_layer_projection_norm.weight}
    for i, layer in enumerate(decoder.layers):
        if family in HYBRIDS:
            mixer = expected_mixer(layer, model.config, tiled)
            result |= {f"{i}.{name}": torch.from_numpy(values) for name, values in mixer.items()}
        elif family in latents.FAMILIES:
            result |= latents.expected_tensors(layer.self_attn, i)
        else:
            result |= _attention_tensors(family, layer.self_attn, i, add)
        for ours, theirs in norms.items():
            result[f"{i}.{ours}"] = getattr(layer, theirs).weight + add
            if family == "opt":
                result[f"{i}.{ours}.bias"] = getattr(layer, theirs).bias
        if family == "opt":
            result |= {f"{i}.up.bias": layer.fc1.bias, f"{i}.down.bias": layer.fc2.bias}
        elif family.startswith("gemma4"):
            result |= _gemma4_tensors(layer, i)
        elif (mixture := _mixture(layer)) is not None:
            result |= _routing(i, mixture)
        elif family == "llama-bias":
            result |= {f"{i}.{part}.bias": getattr(layer.mlp, f"{part}_proj").bias for part in ("gate", "up", "down")}
    return {key: _array(value) for key, value in result.items()}


def _gemma4_tensors(layer: Any, i: int) -> dict[str, torch.Tensor]:
    result = {f"{i}.scale": layer.layer_scalar}
    if hasattr(layer, "per_layer_input_gate"):
        result[f"{i}.input_gate"] = layer.per_layer_input_gate.weight
        result[f"{i}.input_out"] = layer.per_layer_projection.weight
    if hasattr(layer, "router"):
        result |= {f"{i}.router": layer.router.proj.weight, f"{i}.norm.router": layer.router.scale}
        result[f"{i}.router.scales"] = layer.router.per_expert_scale
    return result


def _attention_tensors(family: str, attention: Any, i: int, add: float) -> dict[str, torch.Tensor]:
    fused = hasattr(attention, "qkv_proj")
    names = ["qkv_proj"] if fused else ["q_proj", "k_proj", "v_proj"]
    projections = [own for name in names if (own := getattr(attention, name, None)) is not None]
    out = attention.out_proj if family == "opt" else attention.o_proj
    share = {"glm4": 0.6, "cohere": 1.0, "cohere2": 1.0, "ernie4_5_moe": 1.0, "llama4": 1.0}.get(family, 0.0)
    rotary = round(share * attention.head_dim)
    result = {f"{i}.qkv": _halves([p.weight for p in projections], attention, rotary), f"{i}.out": out.weight}
    if projections[0].bias is not None:
        result[f"{i}.qkv.bias"] = _halves([p.bias for p in projections], attention, rotary)
    if out.bias is not None:
        result[f"{i}.out.bias"] = out.bias
    if hasattr(attention, "sinks"):
        result[f"{i}.sinks"] = attention.sinks
    for name in ("q_norm", "k_norm"):
        if hasattr(attention, name):
            result[f"{i}.{name}"] = getattr(attention, name).weight + add
    return result


def _mixture(layer: Any) -> Any:
    """The module of a layer that holds experts, None in dense layers."""
    if hasattr(layer, "experts"):  # Gemma 4, beside the dense block
        return layer
    block = next(getattr(layer, name) for name in ("block_sparse_moe", "feed_forward", "mlp") if hasattr(layer, name))
    return block if hasattr(block, "experts") else None


def _routing(i: int, mixture: Any) -> dict[str, torch.Tensor]:
    router = mixture.router if hasattr(mixture, "router") else mixture.gate
    result = {f"{i}.router": router.weight}
    if hasattr(mixture, "shared_expert_gate"):
        result[f"{i}.shared_gate"] = mixture.shared_expert_gate.weight
    if getattr(router, "bias", None) is not None:
        result[f"{i}.router.bias"] = router.bias
    if hasattr(mixture.experts, "gate_up_proj_bias"):
        gate_up = mixture.experts.gate_up_proj_bias
        result |= {f"{i}.gate.bias": gate_up[:, 0::2].flatten(), f"{i}.up.bias": gate_up[:, 1::2].flatten()}
        result[f"{i}.down.bias"] = mixture.experts.down_proj_bias.flatten()
    holder = getattr(router, "moe_statics", router)
    if hasattr(holder, "e_score_correction_bias"):
        result[f"{i}.router.correction"] = holder.e_score_correction_bias.flatten()
    return result


def expected_shared(layer: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    if hasattr(layer, "shared_mlp"):
        gate, up = _array(layer.shared_mlp.input_linear.weight).reshape(2, -1, layer.hidden_size)
        return gate, up, _array(layer.shared_mlp.output_linear.weight).T
    mlp = getattr(layer, "mlp", getattr(layer, "feed_forward", None))
    shared = mlp if hasattr(layer, "experts") else getattr(mlp, "shared_experts", getattr(mlp, "shared_expert", None))
    if shared is None:
        return None
    return _array(shared.gate_proj.weight), _array(shared.up_proj.weight), _array(shared.down_proj.weight).T


def expected_neurons(family: str, model: Any, i: int, expert: int) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
    if family == "opt":
        layer = model.model.decoder.layers[i]
        return None, _array(layer.fc1.weight), _array(layer.fc2.weight).T
    mixture = _mixture(model.model.layers[i])
    layer = model.model.layers[i]
    mlp = mixture or (layer.feed_forward if family == "llama4" else layer.mlp)
    if family == "gpt_oss":
        gate_up = _array(mixture.experts.gate_up_proj[expert]).T
        return gate_up[0::2], gate_up[1::2], _array(mixture.experts.down_proj[expert])
    if family == "llama4" and mixture is not None:
        gate, up = _array(mixture.experts.gate_up_proj[expert]).T.reshape(2, -1, model.config.hidden_size)
        return gate, up, _array(mixture.experts.down_proj[expert])
    if mixture is not None:
        gate, up = _array(mlp.experts.gate_up_proj[expert]).reshape(2, -1, model.config.hidden_size)
        return gate, up, _array(mlp.experts.down_proj[expert]).T
    if hasattr(mlp, "gate_up_proj"):
        gate, up = _array(mlp.gate_up_proj.weight).reshape(2, -1, model.config.hidden_size)
        return gate, up, _array(mlp.down_proj.weight).T
    return _array(mlp.gate_proj.weight), _array(mlp.up_proj.weight), _array(mlp.down_proj.weight).T


def check_equal(checkpoint: Checkpoint, family: str, model: Any) -> None:
    """Every logical tensor, read in uneven pieces, is exactly the model's."""
    spec = checkpoint.spec
    expected = expected_tensors(family, model, any(net.tiled for net in spec.delta_nets.values()))
    for key, length in spec.vectors().items():
        found = checkpoint.vector(key)
        assert found.dtype == np.float32
        assert found.shape == (length,)
        np.testing.assert_array_equal(found, expected.pop(key), err_msg=key)
    matrices = spec.shared_matrices()
    for i in range(len(spec.layers)):
        matrices |= spec.layer_matrices(i)
    for key, (rows, columns) in matrices.items():
        cuts = sorted({0, 1, min(rows // 3 + 1, rows), rows - 1, rows})
        pieces = [checkpoint.matrix_rows(key, a, b) for a, b in itertools.pairwise(cuts) if a < b]
        assert all(piece.shape[1] == columns and piece.dtype == np.float32 for piece in pieces)
        np.testing.assert_array_equal(np.concatenate(pieces), expected.pop(key), err_msg=key)
    assert set(expected) <= {"head"}
    for i, layer in enumerate(spec.layers):
        for expert in range(layer.ffn.runs):
            check_neurons(checkpoint, expected_neurons(family, model, i, expert), f"{i}.ffn", expert)
        shared = None if family == "opt" else expected_shared(model.model.layers[i])
        assert (shared is None) == (layer.ffn.shared == 0)
        if shared is not None:
            check_neurons(checkpoint, shared, f"{i}.shared", 0)


def check_neurons(checkpoint: Checkpoint, expected: tuple[np.ndarray | None, ...], key: str, run: int) -> None:
    neurons = checkpoint.spec.layer_neurons(int(key.partition(".")[0]))[key][1]
    for start, stop in ((0, 1), (1, neurons - 3), (neurons - 3, neurons)):
        found = checkpoint.neuron_rows(key, run, start, stop)
        for a, b in zip(found, expected, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                np.testing.assert_array_equal(a, b[start:stop], err_msg=f"{key} {run}")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_directory_holds_the_models_tensors(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, directory = tiny_checkpoint(family, tmp_path, seed=3, dtype=dtype)
    with open_checkpoint(directory) as checkpoint:
        checkpoint.validate()
        check_equal(checkpoint, family, model)
        assert checkpoint.weight_bytes_source == sum(
            p.numel() * dtype.itemsize
            for p in {id(p): p for p in (*model.parameters(), *stored_buffers(model))}.values()
        )


@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_gguf_holds_the_models_tensors(family: str, tmp_path: Path) -> None:
    fields = GGUF_FIELDS.get(family, {})
    model, path = tiny_gguf(family, tmp_path / "tiny.gguf", seed=4, **fields)
    _, directory = tiny_checkpoint(family, tmp_path / "hf", seed=4, **fields)
    with open_checkpoint(path) as checkpoint, open_checkpoint(directory) as other:
        checkpoint.validate()
        check_equal(checkpoint, family, model)
        named = "deepseek_v3" if family == "glm4_moe_lite" else other.spec.family  # whose architecture it shares
        assert comparable(checkpoint.spec) == comparable(replace(other.spec, family=named))


def comparable(spec: Any) -> Any:
    """Numbers rounded to what a float32 in metadata keeps; end tokens left out (GGUF names more)."""

    def rounded(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: rounded(item) for key, item in value.items() if key != "tiled"}  # as the converter orders them
        if isinstance(value, list | tuple):
            return [rounded(item) for item in value]
        return float(f"{value:.5g}") if isinstance(value, float) else value

    return rounded({key: value for key, value in spec.to_json().items() if key != "eos"})
