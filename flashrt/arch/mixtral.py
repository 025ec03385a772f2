"""Mixtral: Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from dataclasses import replace

from flashrt.arch.config import Config
from flashrt.arch.decoder import attention, decoder_spec, layer_count, windows
from flashrt.arch.mixture import EXPERT_NAMES, experts
from flashrt.arch.names import HF_DECODER, HF_LAYER, FfnNames
from flashrt.spec import Layer, ModelSpec

_EXPERT = "block_sparse_moe.experts.{e}."
_OLD = FfnNames(_EXPERT + "w1.weight", _EXPERT + "w3.weight", _EXPERT + "w2.weight")

OLD_NAMES = replace(
    HF_DECODER, layer={**HF_LAYER, "router": ("block_sparse_moe.gate.weight",)}, experts=(_OLD, *EXPERT_NAMES)
)
NEW_NAMES = replace(OLD_NAMES, layer=HF_LAYER)
NAMES = OLD_NAMES


def spec(config: Config) -> ModelSpec:
    window = config.optional("sliding_window")
    config = Config({"num_experts_per_tok": 2, **config.data}, config.family)
    count = config.integer("num_local_experts", config.data.get("num_experts") or 8)
    ffn = experts(config, count, "intermediate_size", normalize_router=True)
    kind = "full_attention" if window is None else "sliding_attention"
    rope = config.rope(1e6)
    layers = [
        Layer(attention(config, config.head_dim(), rope, window=size), ffn)
        for size in windows(config, window, [kind] * layer_count(config))
    ]
    return decoder_spec(config, layers, context=131072, norm_eps=config.number("rms_norm_eps", 1e-5))
