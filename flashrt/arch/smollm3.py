"""SmolLM3: Llama with layers that do not rotate (NoPE)."""

from __future__ import annotations

from dataclasses import replace

from flashrt.arch.config import Config
from flashrt.arch.decoder import attention, decoder_spec, gated_ffn, layer_count, windows
from flashrt.arch.names import HF_DECODER
from flashrt.errors import CheckpointError
from flashrt.spec import Layer, ModelSpec

NAMES = HF_DECODER


def spec(config: Config) -> ModelSpec:
    rotating, bias = rotates(config), config.flag("attention_bias")
    heads = attention(config, config.head_dim(), config.rope(2e6), qkv_bias=bias, out_bias=bias)
    ffn = gated_ffn(config, config.flag("mlp_bias"))
    window = config.optional("sliding_window") if config.flag("use_sliding_window") else None
    types = ["full_attention" if rotated or window is None else "sliding_attention" for rotated in rotating]
    layers = [
        Layer(replace(heads, rope=heads.rope if rotated else None, window=own), ffn)
        for rotated, own in zip(rotating, windows(config, window, types), strict=True)
    ]
    return decoder_spec(config, layers, context=32768, tied=True)


def rotates(config: Config) -> list[bool]:
    """Whether each layer rotates, as `no_rope_layers` says: 1 for those that do."""
    count = layer_count(config)
    found = config.data.get("no_rope_layers")
    if found is None:
        step = config.integer("no_rope_layer_interval", 4)
        return [(i + 1) % step != 0 for i in range(count)]
    if not isinstance(found, list) or len(found) != count or any(type(item) is not int for item in found):
        raise CheckpointError(f"{config.family} config: no_rope_layers is {found!r:.80}, expected {count} numbers")
    return [item != 0 for item in found]
