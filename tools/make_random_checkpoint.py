#!/usr/bin/env python3
"""Write a Hugging Face checkpoint of random bfloat16 weights: something to pack, of any size.

    python -m tools.make_random_checkpoint OUT --layers 6

Shapes are those of Qwen2.5-1.5B, but for the number of layers and a vocabulary of bytes. Weights have the scale of
trained ones and heavier tails than a normal distribution; each layer is a file of its own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tools.make_synthetic_pack import byte_tokenizer

TAIL = 5  # degrees of freedom of Student's t
Array = np.ndarray


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--neurons", type=int, default=8960)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    make(args.out, args.layers, args.hidden, args.neurons, args.seed)


def make(out: Path, layers: int, hidden: int, neurons: int, seed: int) -> None:
    """Write a checkpoint of `layers` layers into the directory `out`, which is made."""
    out.mkdir(parents=True)
    config = {
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": neurons,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 256,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "vocab_size": 256,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    }
    (out / "config.json").write_text(json.dumps(config))
    (out / "tokenizer.json").write_bytes(byte_tokenizer())
    rng, weight_map = np.random.default_rng(seed), {}
    shared = {"model.embed_tokens.weight": (256, hidden), "model.norm.weight": (hidden,)}
    for i in range(layers + 1):
        name = f"model-{i + 1:05d}-of-{layers + 1:05d}.safetensors"
        shapes = shared if i == layers else _layer(i, hidden, neurons)
        _write(out / name, {tensor: _weights(rng, shape) for tensor, shape in shapes.items()})
        weight_map |= dict.fromkeys(shapes, name)
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _layer(i: int, hidden: int, neurons: int) -> dict[str, tuple[int, ...]]:
    kv = hidden // 256 * 64
    attention = {"q": hidden, "k": kv, "v": kv}
    shapes: dict[str, tuple[int, ...]] = {f"self_attn.{name}_proj.weight": (n, hidden) for name, n in attention.items()}
    shapes |= {f"self_attn.{name}_proj.bias": (n,) for name, n in attention.items()}
    shapes |= {
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (neurons, hidden),
        "mlp.up_proj.weight": (neurons, hidden),
        "mlp.down_proj.weight": (hidden, neurons),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    return {f"model.layers.{i}.{name}": shape for name, shape in shapes.items()}


def _weights(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """The bits of bfloat16 numbers, uint16."""
    values = rng.standard_t(TAIL, shape).astype(np.float32) * np.float32(shape[-1] ** -0.5)
    if len(shape) == 1:
        values = 1 + values
    return (values.astype(np.float32).view(np.uint32) >> 16).astype("<u2")


def _write(path: Path, tensors: Mapping[str, Array]) -> None:
    header, offset = {}, 0
    for name, values in tensors.items():
        header[name] = {"dtype": "BF16", "shape": values.shape, "data_offsets": [offset, offset + values.nbytes]}
        offset += values.nbytes
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for values in tensors.values():
            file.write(values.tobytes())


if __name__ == "__main__":
    main()
