#!/usr/bin/env python3
"""Write a GGUF file of random weights in the shape of a real model, as llama.cpp and flashrt read it.

    python -m tools.make_synthetic_gguf OUT.gguf --preset qwen3.5-35b-a3b
    python -m tools.make_synthetic_gguf OUT.gguf --preset gpt-oss-120b --layers 18

Speed measured on such a file is the model's; its text is noise, but not its order: tokens have topics. A token's
embedding is, by `TOPIC_SHARE` of its variance, its topic's. The head prefers tokens of the topic at hand, so that drawn
text (at temperature 1) stays in a topic with a probability of about `STAY`. What layers add is small. So routers, which
are random, name much the same experts for as long as a topic lasts, as real ones do: with both numbers as they are, the
64 experts of 512 that were used last hold 67% of the ten that a token uses. Which ones are used changes with the topic,
so that a list of 64 favourites would hold 30%.

Matrices have a variance of 1 / inputs and lie as published files have them: experts in MXFP4 and the others in Q8_0, or
all in Q4_K and the embeddings in Q8_0; dense models in the mix of Q4_K_M, of Q4_K and Q6_K. Rows are drawn from a pool,
so the time is that of the disk.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from flashrt.text.bpe import byte_alphabet

TOPICS = 64
TOPIC_SHARE = 0.6
STAY = 0.95
LAYER_SHARE = 0.3  # standard deviation of what all layers add to an embedding
POOL_WEIGHTS = 2 << 20  # random weights encoded for each row length and format
CHUNK_ROWS = 8192  # of embeddings that are made at a time

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers of a mixture, or with no experts of a dense model.

    `delta_heads` make it a hybrid of gated delta nets, as Qwen 3.5 is.
    """

    arch: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    neurons: int  # of an expert
    experts: int
    experts_per_token: int
    vocab: int
    context: int
    experts_format: str = "Q4_K"
    format: str = "Q4_K"
    ends_format: str = "Q8_0"  # of embeddings and head
    delta_heads: int = 0
    delta_keys: int = 0
    delta_dim: int = 128


PRESETS = {
    "gpt-oss-120b": Shape("gpt-oss", 2880, 36, 64, 8, 64, 2880, 128, 4, 201088, 131072, "MXFP4", "Q8_0"),
    "gpt-oss-20b": Shape("gpt-oss", 2880, 24, 64, 8, 64, 2880, 32, 4, 201088, 131072, "MXFP4", "Q8_0"),
    "qwen3.5-35b-a3b": Shape(
        "qwen35moe", 2048, 40, 16, 2, 256, 512, 256, 8, 248320, 262144, delta_heads=32, delta_keys=16
    ),
    "llama-70b": Shape("llama", 8192, 80, 64, 8, 128, 28672, 0, 0, 128256, 131072, ends_format="Q6_K"),
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the file: its shape as numpy has it, its format, and the values that are not random."""

    shape: tuple[int, ...]
    format: str = "F32"
    scale: float = 1.0  # of the standard deviation
    values: Callable[[], Iterator[Array]] | None = None  # float32, some rows at a time


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--preset", choices=PRESETS, required=True)
    for field in ("layers", "vocab", "experts"):
        parser.add_argument(f"--{field}", type=int, metavar="N", help="in place of the preset's")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    given = {name: value for name in ("layers", "vocab", "experts") if (value := getattr(args, name)) is not None}
    make(args.out, replace(PRESETS[args.preset], **given), args.seed)


def make(out: Path, shape: Shape, seed: int = 0) -> None:
    """Write the file."""
    import gguf

    writer = gguf.GGUFWriter(out, shape.arch)
    _write_metadata(writer, shape)
    tensors, pools = tensors_of(shape, seed), Pools(seed)
    for name, tensor in tensors.items():
        kind = gguf.GGMLQuantizationType[tensor.format]
        block, nbytes = gguf.GGML_QUANT_SIZES[kind]
        count = math.prod(tensor.shape) // block * nbytes
        row = (*tensor.shape[:-1], tensor.shape[-1] // block * nbytes)
        if tensor.format == "F32":
            writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), count)
        else:
            writer.add_tensor_info(name, row, np.dtype(np.uint8), count, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with out.open("r+b") as file:
        file.seek(0, 2)
        for tensor in tensors.values():
            file.write(b"\0" * (-file.tell() % writer.data_alignment))
            for part in _parts(tensor, pools):
                file.write(part.data)
    writer.close()


class Pools:
    """Encoded rows of random weights, for each row length, format and scale."""

    def __init__(self, seed: int) -> None:
        self._rng, self._pools = np.random.default_rng(seed), dict[tuple[int, str, float], Array]()

    def rows(self, count: int, tensor: Tensor) -> Array:
        """uint8 [count, bytes of a row]."""
        columns, key = tensor.shape[-1], (tensor.shape[-1], tensor.format, tensor.scale)
        if key not in self._pools:
            values = self._rng.standard_normal((max(POOL_WEIGHTS // columns, 64), columns), dtype=np.float32)
            self._pools[key] = encoded(values * np.float32(tensor.scale / math.sqrt(columns)), tensor.format)
        pool = self._pools[key]
        return pool[self._rng.integers(0, len(pool), count)]


def encoded(values: Array, form: str) -> Array:
    """Rows of float32 as a format of GGUF has them, uint8 [rows, bytes]."""
    import gguf

    if form == "Q4_K":
        return _q4_k(values)
    if form == "Q6_K":
        return _q6_k(values)
    if form == "F32":
        return values.view(np.uint8)
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[form])


def _q4_k(values: Array) -> Array:
    """Rows in blocks of 256 that share one scale: codes of 0 to 15 around 7.5, all sub-blocks scaled alike."""
    blocks = values.reshape(-1, 256)
    step = np.abs(blocks).max(1, keepdims=True) / 7.5
    codes = np.clip(np.round(blocks / np.where(step == 0, 1, step) + 7.5), 0, 15).astype(np.uint8)
    halves = codes.reshape(-1, 4, 2, 32)
    scales = np.full((len(blocks), 12), 0, np.uint8)
    scales[:, :8], scales[:, 8:] = 32, 0  # six bits each: sub-blocks 0 to 3 in bytes 0 to 7
    scales[:, :4] |= (32 >> 4) << 6  # the upper bits of sub-blocks 4 to 7
    scales[:, 4:8] |= (32 >> 4) << 6
    sizes = np.concatenate((step / 32, step * (7.5 / 32)), 1).astype(np.float16).view(np.uint8)
    packed = (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(len(blocks), 128)
    return np.concatenate((sizes, scales, packed), 1).reshape(len(values), -1)


def _q6_k(values: Array) -> Array:
    """Rows in blocks of 256 that share one scale: codes of -32 to 31, all sub-blocks scaled alike."""
    blocks = values.reshape(-1, 256)
    step = np.abs(blocks).max(1, keepdims=True) / 31
    codes = (np.round(blocks / np.where(step == 0, 1, step)) + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    low, high = codes & 15, codes >> 4
    nibbles = np.stack((low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4), 2)
    pairs = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    scales = np.full((len(blocks), 16), 64, np.uint8)
    size = (step / 64).astype(np.float16).view(np.uint8)
    parts = nibbles.reshape(len(blocks), 128), pairs.reshape(len(blocks), 64), scales, size
    return np.concatenate(parts, 1).reshape(len(values), -1)


def _parts(tensor: Tensor, pools: Pools) -> Iterator[Array]:
    if tensor.values is not None:
        yield from (encoded(values, tensor.format) for values in tensor.values())
        return
    rows = math.prod(tensor.shape[:-1])
    for begin in range(0, rows, CHUNK_ROWS):
        yield pools.rows(min(CHUNK_ROWS, rows - begin), tensor)


def tensors_of(shape: Shape, seed: int) -> dict[str, Tensor]:
    """Every tensor of the file, in order."""
    topics = np.random.default_rng(seed + 1).standard_normal((TOPICS, shape.hidden), dtype=np.float32)
    embedding = Tensor((shape.vocab, shape.hidden), shape.ends_format, values=lambda: _embeddings(shape, topics, seed))
    head = Tensor((shape.vocab, shape.hidden), shape.ends_format, values=lambda: _head(shape, topics, seed))
    result = {"token_embd.weight": embedding, "output_norm.weight": _ones(shape.hidden), "output.weight": head}
    for i in range(shape.layers):
        own = LAYERS[shape.arch](shape, i)
        result |= {f"blk.{i}.{name}": tensor for name, tensor in own.items()}
    return result


def _embeddings(shape: Shape, topics: Array, seed: int) -> Iterator[Array]:
    rng = np.random.default_rng(seed + 2)
    for tokens in _tokens(shape):
        own = rng.standard_normal((len(tokens), shape.hidden), dtype=np.float32)
        yield math.sqrt(TOPIC_SHARE) * topics[tokens % TOPICS] + np.float32(math.sqrt(1 - TOPIC_SHARE)) * own


def _head(shape: Shape, topics: Array, seed: int) -> Iterator[Array]:
    """Logits of the topic at hand lie above the others by as much as a stay of `STAY` asks for."""
    rng = np.random.default_rng(seed + 3)
    lead = math.log(STAY / (1 - STAY) * (TOPICS - 1))
    scale = lead * math.sqrt(1 + LAYER_SHARE**2) / (math.sqrt(TOPIC_SHARE) * shape.hidden)
    for tokens in _tokens(shape):
        own = rng.standard_normal((len(tokens), shape.hidden), dtype=np.float32)
        yield np.float32(scale) * topics[tokens % TOPICS] + np.float32(0.5 / math.sqrt(shape.hidden)) * own


def _tokens(shape: Shape) -> Iterator[Array]:
    for begin in range(0, shape.vocab, CHUNK_ROWS):
        yield np.arange(begin, min(begin + CHUNK_ROWS, shape.vocab))


def _ones(*shape: int) -> Tensor:
    return Tensor(shape, values=lambda: iter([np.ones((1, math.prod(shape)), np.float32)]))


def _zeros(*shape: int) -> Tensor:
    return Tensor(shape, values=lambda: iter([np.zeros((1, math.prod(shape)), np.float32)]))


def _added(shape: Shape) -> float:
    """Standard deviation of what a block adds."""
    return LAYER_SHARE / math.sqrt(2 * shape.layers)


def _experts(shape: Shape) -> dict[str, Tensor]:
    experts, hidden, neurons, form = shape.experts, shape.hidden, shape.neurons, shape.experts_format
    return {
        "ffn_gate_inp.weight": Tensor((experts, hidden)),
        "ffn_gate_exps.weight": Tensor((experts, neurons, hidden), form),
        "ffn_up_exps.weight": Tensor((experts, neurons, hidden), form),
        "ffn_down_exps.weight": Tensor((experts, hidden, neurons), form, _added(shape)),
    }


def _llama_layer(shape: Shape, index: int) -> dict[str, Tensor]:
    hidden, neurons, form, eighth = shape.hidden, shape.neurons, shape.format, shape.layers // 8
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    more = index < eighth or index >= 7 * eighth or (index - eighth) % 3 == 2  # as Q4_K_M has it
    finer = "Q6_K" if more else form
    return {
        "attn_norm.weight": _ones(hidden),
        "attn_q.weight": Tensor((queries, hidden), form),
        "attn_k.weight": Tensor((keys, hidden), form),
        "attn_v.weight": Tensor((keys, hidden), finer),
        "attn_output.weight": Tensor((hidden, queries), form, _added(shape)),
        "ffn_norm.weight": _ones(hidden),
        "ffn_gate.weight": Tensor((neurons, hidden), form),
        "ffn_up.weight": Tensor((neurons, hidden), form),
        "ffn_down.weight": Tensor((hidden, neurons), finer, _added(shape)),
    }


def _gpt_oss_layer(shape: Shape, index: int) -> dict[str, Tensor]:
    hidden, form, experts = shape.hidden, shape.format, shape.experts
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    rows = {"q": queries, "k": keys, "v": keys}
    return {
        "attn_norm.weight": _ones(hidden),
        **{f"attn_{name}.weight": Tensor((count, hidden), form) for name, count in rows.items()},
        **{f"attn_{name}.bias": _zeros(count) for name, count in rows.items()},
        "attn_output.weight": Tensor((hidden, queries), form, _added(shape)),
        "attn_output.bias": _zeros(hidden),
        "attn_sinks.weight": _zeros(shape.heads),
        "post_attention_norm.weight": _ones(hidden),
        **_experts(shape),
        "ffn_gate_inp.bias": _zeros(experts),
        "ffn_gate_exps.bias": _zeros(experts, shape.neurons),
        "ffn_up_exps.bias": _zeros(experts, shape.neurons),
        "ffn_down_exps.bias": _zeros(experts, hidden),
    }


def _qwen_layer(shape: Shape, index: int) -> dict[str, Tensor]:
    hidden, form = shape.hidden, shape.format
    shared = {
        "ffn_gate_inp_shexp.weight": Tensor((hidden,)),
        "ffn_gate_shexp.weight": Tensor((shape.neurons, hidden), form),
        "ffn_up_shexp.weight": Tensor((shape.neurons, hidden), form),
        "ffn_down_shexp.weight": Tensor((hidden, shape.neurons), form, _added(shape)),
    }
    norms = {"attn_norm.weight": _ones(hidden), "post_attention_norm.weight": _ones(hidden)}
    mixer = _qwen_attention(shape) if index % 4 == 3 else _delta_net(shape)
    return norms | mixer | _experts(shape) | shared


def _qwen_attention(shape: Shape) -> dict[str, Tensor]:
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return {
        "attn_q.weight": Tensor((2 * queries, shape.hidden), shape.format),  # and their gates
        "attn_k.weight": Tensor((keys, shape.hidden), shape.format),
        "attn_v.weight": Tensor((keys, shape.hidden), shape.format),
        "attn_q_norm.weight": _ones(shape.head_dim),
        "attn_k_norm.weight": _ones(shape.head_dim),
        "attn_output.weight": Tensor((shape.hidden, queries), shape.format, _added(shape)),
    }


def _delta_net(shape: Shape) -> dict[str, Tensor]:
    keys, values = shape.delta_keys * shape.delta_dim, shape.delta_heads * shape.delta_dim
    decays = [np.full((1, shape.delta_heads), -1.0, np.float32)]
    return {
        "attn_qkv.weight": Tensor((2 * keys + values, shape.hidden), shape.format),
        "attn_gate.weight": Tensor((values, shape.hidden), shape.format),
        "ssm_alpha.weight": Tensor((shape.delta_heads, shape.hidden), "Q8_0"),
        "ssm_beta.weight": Tensor((shape.delta_heads, shape.hidden), "Q8_0"),
        "ssm_conv1d.weight": Tensor((2 * keys + values, 4)),
        "ssm_a": Tensor((shape.delta_heads,), values=lambda: iter(decays)),
        "ssm_dt.bias": _zeros(shape.delta_heads),
        "ssm_norm.weight": _ones(shape.delta_dim),
        "ssm_out.weight": Tensor((shape.hidden, values), shape.format, _added(shape)),
    }


def _write_metadata(writer: Any, shape: Shape) -> None:
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.neurons)
    if shape.experts:
        writer.add_expert_feed_forward_length(shape.neurons)
        writer.add_expert_count(shape.experts)
        writer.add_expert_used_count(shape.experts_per_token)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    METADATA[shape.arch](writer, shape)
    _write_tokenizer(writer, shape.vocab)


def _write_gpt_oss(writer: Any, shape: Shape) -> None:
    import gguf

    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(150000.0)
    writer.add_sliding_window(128)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(32.0)
    writer.add_rope_scaling_orig_ctx_len(4096)


def _write_qwen(writer: Any, shape: Shape) -> None:
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10_000_000.0)
    writer.add_rope_dimension_count(shape.head_dim // 4)
    third = shape.head_dim // 4 // 6
    writer.add_rope_dimension_sections([shape.head_dim // 8 - 2 * third, third, third, 0])
    writer.add_expert_shared_feed_forward_length(shape.neurons)
    writer.add_full_attention_interval(4)
    writer.add_ssm_conv_kernel(4)
    writer.add_ssm_state_size(shape.delta_dim)
    writer.add_ssm_group_count(shape.delta_keys)
    writer.add_ssm_time_step_rank(shape.delta_heads)
    writer.add_ssm_inner_size(shape.delta_heads * shape.delta_dim)


def _write_llama(writer: Any, shape: Shape) -> None:
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_rope_dimension_count(shape.head_dim)


LAYERS = {"gpt-oss": _gpt_oss_layer, "qwen35moe": _qwen_layer, "llama": _llama_layer}
METADATA = {"gpt-oss": _write_gpt_oss, "qwen35moe": _write_qwen, "llama": _write_llama}


def _write_tokenizer(writer: Any, vocab: int) -> None:
    """Bytes, one merge, and tokens that no text has."""
    letters = list(byte_alphabet())
    tokens = [*letters, "aa", *(f"<unused{i}>" for i in range(vocab - len(letters) - 1))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(letters) + 1) + [5] * (vocab - len(letters) - 1))
    writer.add_token_merges(["a a"])
    writer.add_eos_token_id(vocab - 1)
    writer.add_add_bos_token(False)


if __name__ == "__main__":
    main()
