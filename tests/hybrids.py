"""Tiny hybrids of gated delta nets: their shapes, and what llama.cpp's converter makes of their tensors."""

from __future__ import annotations

from typing import Any

import numpy as np

SHAPE: dict[str, Any] = {
    "head_dim": 20,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 20,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1000.0,
        "partial_rotary_factor": 0.6,
        "mrope_section": [2, 2, 2],
        "mrope_interleaved": True,
    },
}
GGUF_FIELDS = {"linear_value_head_dim": 12}  # llama.cpp knows one number for keys and values
MIXTURE: dict[str, Any] = {
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}
LEAVES = {
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_ba": "ssm_ba",  # before those that begin alike
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
}


def gguf_values(name: str, values: np.ndarray, config: Any, tiled: bool) -> np.ndarray:
    """What the converter changes: norms hold 1 + w, rates what they decay by, and heads of values may be tiled."""
    if name.endswith("norm.weight") and "linear_attn" not in name:
        return values + 1
    if name.endswith("A_log"):
        values = -np.exp(values)
    if name.endswith("conv1d.weight"):
        values = values[:, 0]
    if not tiled or "linear_attn" not in name or name.endswith("norm.weight"):
        return np.ascontiguousarray(values)
    heads, keys = config.linear_num_value_heads, config.linear_num_key_heads
    dim = (
        1
        if name.endswith(("A_log", "dt_bias", "in_proj_a.weight", "in_proj_b.weight"))
        else config.linear_value_head_dim
    )
    axis = 1 if name.endswith("out_proj.weight") else 0
    first = values.shape[axis] - heads * dim  # of the values
    before, rest = np.split(values, [first], axis)
    split = rest.reshape(*rest.shape[:axis], keys, heads // keys, dim, *rest.shape[axis + 1 :])
    return np.ascontiguousarray(np.concatenate((before, split.swapaxes(axis, axis + 1).reshape(rest.shape)), axis))


def write_metadata(writer: Any, config: Any) -> None:
    writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
    writer.add_ssm_state_size(config.linear_key_head_dim)
    writer.add_ssm_group_count(config.linear_num_key_heads)
    writer.add_ssm_time_step_rank(config.linear_num_value_heads)
    writer.add_ssm_inner_size(config.linear_value_head_dim * config.linear_num_value_heads)
    rotary = int(config.head_dim * config.rope_parameters["partial_rotary_factor"])
    writer.add_rope_dimension_count(rotary)
    types = config.layer_types
    if types == regular(len(types)):
        writer.add_full_attention_interval(4)
    else:
        writer.add_array(f"{writer.arch}.attention.recurrent_layers", [kind == "linear_attention" for kind in types])
    if writer.arch != "qwen3next":
        third = rotary // 6
        writer.add_rope_dimension_sections([rotary // 2 - 2 * third, third, third, 0])


def regular(layers: int) -> list[str]:
    return ["linear_attention" if (i + 1) % 4 else "full_attention" for i in range(layers)]


def expected_mixer(layer: Any, config: Any, tiled: bool) -> dict[str, np.ndarray]:
    """Logical vectors and matrices of a layer's mixer as the model itself holds them; heads of values as GGUF may."""
    if hasattr(layer, "self_attn"):
        attention = layer.self_attn
        q, k, v, out = (getattr(attention, f"{name}_proj").weight.detach().numpy() for name in "qkvo")
        query, gate = q.reshape(config.num_attention_heads, 2, -1, q.shape[1]).swapaxes(0, 1)
        norms = {f"{name}_norm": getattr(attention, f"{name}_norm").weight.detach().numpy() + 1 for name in "qk"}
        joined = np.concatenate((query.reshape(-1, q.shape[1]), k, v))
        return {"qkv": joined, "gate": gate.reshape(-1, q.shape[1]), "out": out, **norms}
    own = {name: gguf_values(f"linear_attn.{name}", values.numpy(), config, tiled) for name, values in
           layer.linear_attn.state_dict().items()}  # fmt: skip
    return {
        **_projections(own, config),
        "taps": own["conv1d.weight"].T.ravel(),
        "decay.rate": own["A_log"],
        "decay.bias": own["dt_bias"],
        "head_norm": own["norm.weight"],
        "out": own["out_proj.weight"],
    }


def _projections(own: dict[str, np.ndarray], config: Any) -> dict[str, np.ndarray]:
    names = {"qkv": "in_proj_qkv", "gate": "in_proj_z", "beta": "in_proj_b", "decay": "in_proj_a"}
    if "in_proj_qkv.weight" in own:
        return {ours: own[f"{theirs}.weight"] for ours, theirs in names.items()}
    qkv, gate = split_projection(own["in_proj_qkvz.weight"], config)
    beta, decay = _of_key_heads(own["in_proj_ba.weight"], config, 2)
    return {"qkv": qkv, "gate": gate, "beta": beta, "decay": decay}


def split_projection(rows: np.ndarray, config: Any) -> tuple[np.ndarray, np.ndarray]:
    """Rows of queries, keys and values, and of gates, as the converter takes Qwen3-Next's apart."""
    key, values = config.linear_key_head_dim, config.linear_num_value_heads * config.linear_value_head_dim
    cuts = np.cumsum([key, key, values // config.linear_num_key_heads])
    query, key, value, gate = _of_key_heads(rows, config, cuts)
    return np.concatenate((query, key, value)), gate


def _of_key_heads(rows: np.ndarray, config: Any, cuts: Any) -> list[np.ndarray]:
    """Rows that lie together for each key head, taken apart."""
    each = rows.reshape(config.linear_num_key_heads, -1, rows.shape[1])
    return [part.reshape(-1, rows.shape[1]) for part in np.split(each, cuts, axis=1)]
