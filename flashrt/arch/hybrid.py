"""What hybrids of attention and gated delta nets share: names of their tensors, and how their fields are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from flashrt.arch.config import Config, without_sections
from flashrt.arch.decoder import attention, decoder_spec, layer_count
from flashrt.arch.metadata import Metadata
from flashrt.arch.names import GGUF_AHEAD, GGUF_NAMES, HF_DECODER, Names
from flashrt.errors import CheckpointError, UnsupportedModelError
from flashrt.spec import DeltaNet, Ffn, Layer, Mixer, ModelSpec

RECURRENT = {
    "taps": ("linear_attn.conv1d.weight",),
    "decay.rate": ("linear_attn.A_log",),
    "decay.bias": ("linear_attn.dt_bias",),
    "head_norm": ("linear_attn.norm.weight",),
    "out": ("linear_attn.out_proj.weight",),
}
GGUF_RECURRENT = {
    "qkv": ("attn_qkv.weight",),
    "gate": ("attn_gate.weight",),
    "taps": ("ssm_conv1d.weight",),
    "decay.rate": ("ssm_a",),
    "decay.bias": ("ssm_dt.bias",),
    "head_norm": ("ssm_norm.weight",),
    "out": ("ssm_out.weight",),
}
# Of each, names of the projections differ between families.
HYBRID = replace(HF_DECODER, norm_add=1.0, recurrent=RECURRENT, log_rate=True)
_AHEAD = {
    "join": "fc.weight",
    "norm.token": "pre_fc_norm_embedding.weight",
    "norm.state": "pre_fc_norm_hidden.weight",
    "norm.final": "norm.weight",
}
GGUF_HYBRID = replace(
    GGUF_NAMES,
    layer={**GGUF_NAMES.layer, "norm.ffn": ("post_attention_norm.weight",)},
    recurrent=GGUF_RECURRENT,
    ahead=GGUF_AHEAD,
)


def with_ahead(names: Names) -> Names:
    """The names, and those of a layer that predicts further tokens, which checkpoints hold apart."""
    return replace(names, apart=replace(names, prefixes=("mtp.", "model.mtp."), shared=_AHEAD))


def hybrid_spec(config: Config, ffns: Sequence[Ffn]) -> ModelSpec:
    """The spec of a hybrid of which layers have the feed-forward blocks `ffns`."""
    config = Config(without_sections(config.data), config.family)
    config.refuse("attention_bias", False)
    config.refuse("attn_output_gate", True)
    config.refuse("output_gate_type", "swish", "silu")  # of delta nets
    config.refuse("hidden_act", "silu")
    dim = config.head_dim(256)
    attends = attention(config, dim, config.partial_rope(dim, 0.25), qk_norm=True, output_gate=True)
    net = _delta_net(config)
    mixers: list[Mixer] = [net if recurrent else attends for recurrent in _recurrent_layers(config)]
    layers = [Layer(mixer, ffn) for mixer, ffn in zip(mixers, ffns, strict=True)]
    return decoder_spec(config, layers, context=32768)


def _recurrent_layers(config: Config) -> list[bool]:
    """Whether each layer is recurrent, from `layer_types` or, where the config has none, all but every fourth."""
    count = layer_count(config)
    every = config.integer("full_attention_interval", 4)
    types = config.names("layer_types", count)
    if types is None:
        return [(i + 1) % every != 0 for i in range(count)]
    for name in types:
        if name not in ("full_attention", "linear_attention"):
            raise UnsupportedModelError(f"{config.family} with {name!r} layers is not supported")
    return [name == "linear_attention" for name in types]


def _delta_net(config: Config) -> DeltaNet:
    return DeltaNet(
        key_heads=config.integer("linear_num_key_heads", 16, maximum=1 << 14),
        heads=config.integer("linear_num_value_heads", 32, maximum=1 << 14),
        key_dim=config.integer("linear_key_head_dim", 128, maximum=1 << 14),
        value_dim=config.integer("linear_value_head_dim", 128, maximum=1 << 14),
        taps=config.integer("linear_conv_kernel_dim", 4, maximum=1 << 14),
        tiled=config.flag("tiled_value_heads"),
    )


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
