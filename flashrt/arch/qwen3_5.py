"""Qwen 3.5, text: a gated delta net in three of four layers, gated attention in the fourth, norms of 1 + w."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from flashrt.arch.config import Config
from flashrt.arch.decoder import attention, decoder_spec, gated_ffn, layer_count, recurrent_layers
from flashrt.arch.metadata import Metadata
from flashrt.arch.names import GGUF_NAMES, HF_DECODER
from flashrt.errors import CheckpointError
from flashrt.spec import DeltaNet, Ffn, Layer, Mixer, ModelSpec

_RECURRENT = {
    "taps": ("linear_attn.conv1d.weight",),
    "decay.rate": ("linear_attn.A_log",),
    "decay.bias": ("linear_attn.dt_bias",),
    "head_norm": ("linear_attn.norm.weight",),
    "out": ("linear_attn.out_proj.weight",),
}
_GGUF_RECURRENT = {
    "qkv": ("attn_qkv.weight",),
    "gate": ("attn_gate.weight",),
    "taps": ("ssm_conv1d.weight",),
    "decay.rate": ("ssm_a",),
    "decay.bias": ("ssm_dt.bias",),
    "head_norm": ("ssm_norm.weight",),
    "out": ("ssm_out.weight",),
}
# Of these, projections to rows differ between families: see `NAMES`.
HYBRID = replace(HF_DECODER, norm_add=1.0, recurrent=_RECURRENT, log_rate=True)
GGUF_HYBRID = replace(
    GGUF_NAMES,
    layer={**GGUF_NAMES.layer, "norm.ffn": ("post_attention_norm.weight",)},
    recurrent=_GGUF_RECURRENT,
    beyond="nextn.eh_proj.weight",
)
NAMES = replace(
    HYBRID,
    recurrent={
        **_RECURRENT,
        "qkv": ("linear_attn.in_proj_qkv.weight",),
        "gate": ("linear_attn.in_proj_z.weight",),
        "beta": ("linear_attn.in_proj_b.weight",),
        "decay": ("linear_attn.in_proj_a.weight",),
    },
)
GGUF = replace(GGUF_HYBRID, recurrent={**_GGUF_RECURRENT, "beta": ("ssm_beta.weight",), "decay": ("ssm_alpha.weight",)})
_SECTIONS = "rope.dimension_sections"
GGUF_KEYS = (_SECTIONS, "nextn_predict_layers")


def spec(config: Config) -> ModelSpec:
    return hybrid_spec(config, [gated_ffn(config)] * layer_count(config))


def hybrid_spec(config: Config, ffns: Sequence[Ffn]) -> ModelSpec:
    """The spec of a hybrid of which layers have the feed-forward blocks `ffns`."""
    config = _without_sections(config)
    config.refuse("attention_bias", False)
    config.refuse("attn_output_gate", True)
    config.refuse("hidden_act", "silu")
    dim = config.head_dim(256)
    attends = attention(config, dim, config.partial_rope(dim, 0.25), qk_norm=True, output_gate=True)
    net = _delta_net(config)
    mixers: list[Mixer] = [net if recurrent else attends for recurrent in recurrent_layers(config)]
    layers = [Layer(mixer, ffn) for mixer, ffn in zip(mixers, ffns, strict=True)]
    return decoder_spec(config, layers, context=32768)


def _delta_net(config: Config) -> DeltaNet:
    return DeltaNet(
        key_heads=config.integer("linear_num_key_heads", 16, maximum=1 << 14),
        heads=config.integer("linear_num_value_heads", 32, maximum=1 << 14),
        key_dim=config.integer("linear_key_head_dim", 128, maximum=1 << 14),
        value_dim=config.integer("linear_value_head_dim", 128, maximum=1 << 14),
        taps=config.integer("linear_conv_kernel_dim", 4, maximum=1 << 14),
        tiled=config.flag("tiled_value_heads"),
    )


def _without_sections(config: Config) -> Config:
    """Of text alone, positions in time, height and width are the same number: it does not matter which rotates what."""
    data = dict(config.data)
    for key in ("rope_parameters", "rope_scaling"):
        if found := config.object(key):
            data[key] = {k: v for k, v in found.items() if k not in ("mrope_section", "mrope_interleaved")}
    return Config(data, config.family)


def gguf(config: Mapping[str, Any], fields: Metadata) -> dict[str, Any]:
    """llama.cpp's converter stores heads of values tiled: neighbours read from neighbouring keys."""
    sections = fields.integers(_SECTIONS)
    if sections is not None and 2 * sum(sections) != fields.integer("rope.dimension_count"):
        raise CheckpointError(f"GGUF metadata: {_SECTIONS} is {list(sections)}, which is not what is rotated")
    return gguf_hybrid(config, fields) | {"tiled_value_heads": True}


def gguf_hybrid(config: Mapping[str, Any], fields: Metadata) -> dict[str, Any]:
    """What all hybrids of gated delta nets have."""
    values, inner = fields.integer("ssm.time_step_rank"), fields.integer("ssm.inner_size")
    if not values or not inner or inner % values:
        raise CheckpointError(f"GGUF metadata: ssm.inner_size is {inner!r}, ssm.time_step_rank {values!r}")
    layers = (config["num_hidden_layers"] or 0) - fields.integer("nextn_predict_layers", 0)
    return {
        "linear_num_key_heads": fields.integer("ssm.group_count"),
        "linear_num_value_heads": values,
        "linear_key_head_dim": fields.integer("ssm.state_size"),
        "linear_value_head_dim": inner // values,
        "linear_conv_kernel_dim": fields.integer("ssm.conv_kernel"),
        "full_attention_interval": fields.integer("full_attention_interval"),
        "layer_types": _layer_types(fields, layers),
        "num_hidden_layers": layers,  # without those that predict further tokens
    }


def _layer_types(fields: Metadata, layers: int) -> list[str] | None:
    """Of the first layers, where the file says it; None where every so many of them attend."""
    recurrent = fields.per_layer("attention.recurrent_layers")
    if recurrent is None or isinstance(recurrent, int):
        return None
    return ["linear_attention" if own else "full_attention" for own in recurrent[: max(layers, 0)]]
