"""OPT: layer norms, biases everywhere, learned positions, a feed-forward block without gate (ReLU)."""

from __future__ import annotations

from flashrt.arch.config import Config
from flashrt.arch.decoder import layer_count
from flashrt.arch.names import FfnNames, Names
from flashrt.errors import CheckpointError, UnsupportedModelError
from flashrt.spec import Attention, Ffn, Layer, ModelSpec

POSITION_OFFSET = 2  # the table's first two rows are never used: fairseq counted positions after the padding token

NAMES = Names(
    prefixes=("model.decoder.", "decoder."),
    shared={
        "embed": "embed_tokens.weight",
        "positions": "embed_positions.weight",
        "norm.final": "final_layer_norm.weight",
        "norm.final.bias": "final_layer_norm.bias",
    },
    layer={
        "norm.attention": ("self_attn_layer_norm.weight",),
        "norm.attention.bias": ("self_attn_layer_norm.bias",),
        "norm.ffn": ("final_layer_norm.weight",),
        "norm.ffn.bias": ("final_layer_norm.bias",),
        "qkv": tuple(f"self_attn.{name}_proj.weight" for name in "qkv"),
        "qkv.bias": tuple(f"self_attn.{name}_proj.bias" for name in "qkv"),
        "out": ("self_attn.out_proj.weight",),
        "out.bias": ("self_attn.out_proj.bias",),
        "up.bias": ("fc1.bias",),
        "down.bias": ("fc2.bias",),
    },
    dense=(FfnNames(None, "fc1.weight", "fc2.weight"),),
)


def spec(config: Config) -> ModelSpec:
    hidden, (heads, _) = config.integer("hidden_size"), config.heads()
    if config.integer("word_embed_proj_dim", hidden) != hidden:
        raise UnsupportedModelError("opt with word_embed_proj_dim other than hidden_size (opt-350m) is not supported")
    if not config.flag("do_layer_norm_before", True) or config.flag("_remove_final_layer_norm"):
        raise UnsupportedModelError("opt with do_layer_norm_before=false (post-norm, opt-350m) is not supported")
    config.refuse("layer_norm_elementwise_affine", True)
    if hidden % heads:
        raise CheckpointError(f"opt config: hidden_size {hidden} is not a multiple of {heads} heads")
    bias, context = config.flag("enable_bias", True), config.integer("max_position_embeddings", 2048)
    attention = Attention(heads, heads, hidden // heads, (hidden // heads) ** -0.5, qkv_bias=bias, out_bias=bias)
    activation = config.activation("activation_function", "relu")
    layer = Layer(attention, Ffn(config.integer("ffn_dim"), activation, gated=False, bias=bias))
    bos = config.token_ids("bos_token_id")
    return ModelSpec(
        "opt",
        config.integer("vocab_size"),
        hidden,
        (layer,) * layer_count(config),
        context,
        norm="layer",
        norm_eps=1e-5,
        tied=config.flag("tie_word_embeddings", True),
        positions=context + POSITION_OFFSET,
        position_offset=POSITION_OFFSET,
        bos=bos[0] if bos else None,
        eos=config.token_ids("eos_token_id"),
    )
