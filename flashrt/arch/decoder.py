"""What the Llama-like families share: reading the common fields into a ModelSpec."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flashrt.arch.config import Config
from flashrt.errors import CheckpointError, UnsupportedModelError
from flashrt.rope import MAX_CONTEXT, Rope
from flashrt.spec import MAX_LAYERS, Attention, Ffn, Layer, ModelSpec, full_ropes


def attention(config: Config, head_dim: int, rope: Rope, **options: Any) -> Attention:
    """Full attention with the usual scale; `options` override or add fields."""
    heads, kv_heads = config.heads()
    if head_dim % 2:
        raise UnsupportedModelError(
            f"{config.family} with head_dim={head_dim} is not supported: rotary needs an even one"
        )
    fields: dict[str, Any] = {"scale": head_dim**-0.5, "rope": rope, **options}
    return Attention(heads, kv_heads, head_dim, **fields)


def gated_ffn(config: Config, bias: bool = False) -> Ffn:
    """`bias`: what a family makes of `mlp_bias`; most know none."""
    if not bias:
        config.refuse("mlp_bias", False)
    return Ffn(config.integer("intermediate_size"), config.activation("hidden_act", "silu"), bias=bias)


def layer_count(config: Config) -> int:
    return config.integer("num_hidden_layers", maximum=MAX_LAYERS)


def windows(config: Config, window: int | None, default: Sequence[str]) -> list[int | None]:
    """The window of every layer, from `layer_types` or, where the config has none, from `default`."""
    count = layer_count(config)
    types = config.names("layer_types", count) or list(default)
    for name in types:
        if name not in ("full_attention", "sliding_attention"):
            raise UnsupportedModelError(f"{config.family} with {name!r} layers is not supported")
    if window is None and "sliding_attention" in types:
        raise CheckpointError(f"{config.family} config: sliding layers without sliding_window")
    return [window if name == "sliding_attention" else None for name in types]


def decoder_spec(config: Config, layers: Sequence[Layer], **options: Any) -> ModelSpec:
    """The spec of an RMS-normed decoder; `options` override or add fields."""
    if "logit_softcap" not in options:
        config.refuse("final_logit_softcapping", 0)
        config.refuse("attn_logit_softcapping", 0)
    bos = config.token_ids("bos_token_id")
    fields: dict[str, Any] = {
        "context": _context(config, layers, options.pop("context", None)),
        "norm_eps": config.number("rms_norm_eps", 1e-6),
        "tied": config.flag("tie_word_embeddings", options.pop("tied", False)),
        "bos": bos[0] if bos else None,
        "eos": config.token_ids("eos_token_id"),
        **options,
    }
    vocab = config.integer("vocab_size", fields.pop("vocab", None))
    return ModelSpec(config.family, vocab, config.integer("hidden_size"), tuple(layers), **fields)


def _context(config: Config, layers: Sequence[Layer], default: int | None) -> int:
    """max_position_embeddings, or what the scaling reaches: model cards add a scaling and leave that number."""
    stated = config.integer("max_position_embeddings", default)
    context = max(stated, *(rope.reach for rope in full_ropes(layers)), 0)
    if context > MAX_CONTEXT:
        raise CheckpointError(
            f"{config.family} config: rope scaling reaches {context} tokens, expected at most {MAX_CONTEXT}"
        )
    return context
