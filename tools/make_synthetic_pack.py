#!/usr/bin/env python3
"""Write a pack of random weights in the shape of a real model, straight into the pack format.

    python tools/make_synthetic_pack.py OUT --preset llama-2-70b --dtype int4
    python tools/make_synthetic_pack.py OUT --preset tiny --layers 3 --hidden 96
    python tools/make_synthetic_pack.py OUT --preset mixtral-8x7b --router-skew 1

A block of random bundles is encoded for each kind of tensor and repeated at changing offsets, so the time is that of
checksums and the disk, whatever the size. Weights have a variance of 1 / inputs: activations keep their size. The
tokenizer is one token a byte. Speed measured on such a pack is the model's; its text and perplexity are noise.

With --kv-labels, keys get labels for sparse attention (`run --kv sparse`), by random products.

Random routers use all experts alike. With --router-skew S, the router's row of the expert of rank r (each layer has an
order of its own) is r^-S times as long: the longer a row, the further its logit swings, and the oftener it is chosen.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from flashrt.errors import FlashrtError
from flashrt.labels import KvLabels, LayerLabels, most_channels
from flashrt.rope import Rope
from flashrt.spec import Attention, DeltaNet, Ffn, LatentAttention, Layer, Mixer, ModelSpec
from flashrt.storage.kv_labels import write_labels
from flashrt.storage.layout import TensorLayout
from flashrt.storage.manifest import Manifest
from flashrt.storage.pack import Pack
from flashrt.storage.packer import pack
from flashrt.text.files import TextFiles
from flashrt_kernels import ops
from flashrt_kernels.labels import LABEL_CODES
from flashrt_kernels.rows import DTYPES, MATRIX_ROWS, Codec, row_bytes

POOL_WEIGHTS = 2 << 20  # random weights encoded for each kind of tensor
LABEL_RANGE = 2.5  # standard deviations that codes of labels cover
LABEL_BLOCK = 8  # positions that are chosen together, as calibration has it
STEP = 97  # bundles by which one block's share of the pool is shifted against the next one's

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers of a Llama-like model; `experts` make it a mixture, `delta_heads` a hybrid of gated delta nets.

    `latent` makes it a mixture of DeepSeek's kind, whose keys of `head_dim` numbers begin with latents of so many.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    neurons: int
    vocab: int
    context: int
    experts: int = 0
    experts_per_token: int = 0
    rope_base: int = 10_000
    shared: int = 0  # neurons of a shared expert
    delta_heads: int = 0  # of the layers that are gated delta nets, three of four
    delta_keys: int = 0
    delta_dim: int = 128
    latent: int = 0
    query_rank: int = 0
    nope_dim: int = 0
    value_dim: int = 0
    groups: int = 1  # of experts, of which half take part
    dense: int = 0  # layers before the mixtures
    dense_neurons: int = 0

    def spec(self) -> ModelSpec:
        attention = Attention(
            self.heads, self.kv_heads, self.head_dim, self.head_dim**-0.5, Rope(float(self.rope_base))
        )
        ffn = Ffn(self.neurons, "silu", experts=self.experts, experts_per_token=self.experts_per_token)
        if self.shared:
            ffn = replace(ffn, shared=self.shared, shared_gate=True, normalize_router=True)
        mixers: list[Mixer] = [attention]
        if self.latent:
            return self._latent_spec(ffn)
        if self.delta_heads:
            rope = Rope(float(self.rope_base), dims=self.head_dim // 4)
            net = DeltaNet(self.delta_keys, self.delta_heads, self.delta_dim, self.delta_dim)
            mixers = [net, net, net, replace(attention, rope=rope, qk_norm=True, output_gate=True)]
        families = ("qwen3_5_text", "qwen3_5_moe_text") if self.delta_heads else ("llama", "mixtral")
        return ModelSpec(
            family=families[self.experts > 0],
            vocab=self.vocab,
            hidden=self.hidden,
            layers=tuple(Layer(mixers[i % len(mixers)], ffn) for i in range(self.layers)),
            context=self.context,
            norm_eps=1e-5,
        )

    def _latent_spec(self, ffn: Ffn) -> ModelSpec:
        scale = (self.nope_dim + self.head_dim - self.latent) ** -0.5
        attention = LatentAttention(
            self.heads,
            1,
            self.head_dim,
            scale,
            Rope(float(self.rope_base), dims=self.head_dim - self.latent),
            rank=self.latent,
            nope_dim=self.nope_dim,
            value_dim=self.value_dim,
            query_rank=self.query_rank,
        )
        mixture = replace(
            ffn,
            shared_gate=False,
            router_scores="sigmoid",
            router_correction=True,
            router_groups=self.groups,
            router_groups_used=max(self.groups // 2, 1),
        )
        ffns = [Ffn(self.dense_neurons, "silu") if i < self.dense else mixture for i in range(self.layers)]
        layers = tuple(Layer(attention, own) for own in ffns)
        return ModelSpec("deepseek_v3", self.vocab, self.hidden, layers, self.context)


PRESETS = {
    "tiny": Shape(128, 4, 4, 2, 32, 352, 320, 512),
    "llama-2-7b": Shape(4096, 32, 32, 32, 128, 11008, 32000, 4096),
    "llama-2-13b": Shape(5120, 40, 40, 40, 128, 13824, 32000, 4096),
    "llama-2-70b": Shape(8192, 80, 64, 8, 128, 28672, 32000, 4096),
    "llama-3-8b": Shape(4096, 32, 32, 8, 128, 14336, 128256, 8192, rope_base=500_000),
    "qwen3.5-4b": Shape(
        2560, 32, 16, 4, 256, 9216, 248320, 262144, rope_base=10_000_000, delta_heads=32, delta_keys=16
    ),
    "qwen3.5-35b-a3b": Shape(
        2048, 40, 16, 2, 256, 512, 248320, 262144, 256, 8, 10_000_000, shared=512, delta_heads=32, delta_keys=16
    ),
    "deepseek-v3": Shape(
        *(7168, 61, 128, 1, 576, 2048, 129280, 163840, 256, 8),
        shared=2048,
        latent=512,
        query_rank=1536,
        nope_dim=128,
        value_dim=128,
        groups=8,
        dense=3,
        dense_neurons=18432,
    ),
    "glm-4.7-flash": Shape(
        *(2048, 47, 20, 1, 576, 1536, 154880, 202752, 64, 4, 1_000_000),
        shared=1536,
        latent=512,
        query_rank=768,
        nope_dim=192,
        value_dim=256,
        dense=1,
        dense_neurons=10240,
    ),
    "mixtral-8x7b": Shape(4096, 32, 32, 8, 128, 14336, 32000, 32768, 8, 2),
}


class SyntheticSource:
    """What the packer asks of a checkpoint, for weights that nobody trained."""

    def __init__(self, name: str, spec: ModelSpec, seed: int, router_skew: float = 0.0) -> None:
        self.spec, self.name, self.source = spec, name, f"random weights, seed {seed}, router skew {router_skew:g}"
        self.fingerprint = f"synthetic {seed} {router_skew} {json.dumps(spec.to_json(), sort_keys=True)}"
        self.router_skew = router_skew
        self._rng = np.random.default_rng(seed)

    def vector(self, key: str) -> Array:
        length = self.spec.vectors()[key]
        if key.endswith("decay.rate"):
            return np.full(length, -0.1, np.float32)
        return np.zeros(length, np.float32) if key.endswith("bias") else np.ones(length, np.float32)

    def matrix_rows(self, key: str, start: int, stop: int) -> Array:
        shapes = self.spec.shared_matrices()
        if key not in shapes:
            shapes = self.spec.layer_matrices(int(key.partition(".")[0]))
        columns = shapes[key][1]
        return self._normal((stop - start, columns), 1.0 if key == "embed" else columns**-0.5)

    def router_rows(self, layer: int) -> Array:
        """A skewed router, float32 [experts, hidden]."""
        experts = self.spec.layers[layer].ffn.experts
        ranks = self._rng.permutation(experts) + 1.0
        return self.matrix_rows(f"{layer}.router", 0, experts) * np.float32(ranks[:, None] ** -self.router_skew)

    def neuron_rows(self, key: str, run: int, start: int, stop: int) -> tuple[Array | None, Array, Array]:
        ffn = self.spec.layers[int(key.partition(".")[0])].ffn
        shape = (stop - start, self.spec.hidden)
        gate = self._normal(shape, self.spec.hidden**-0.5) if ffn.gated else None
        return gate, self._normal(shape, self.spec.hidden**-0.5), self._normal(shape, ffn.neurons**-0.5)

    def text_files(self) -> dict[str, bytes]:
        return TextFiles(byte_tokenizer()).to_files()

    def _normal(self, shape: tuple[int, int], scale: float) -> Array:
        return self._rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)


class TiledEncoder:
    """Fills tensors with bundles of a pool, encoded once for each kind of tensor."""

    def __init__(self, source: SyntheticSource) -> None:
        self.source = source
        self._kernels, self._wrap = _quantizer()
        self._pools: dict[tuple[str, int, int], Array] = {}
        self._turn = 0

    def fill(self, tensor: TensorLayout, run: int, first: int, bundles: Array) -> None:
        if self.source.router_skew and tensor.name.endswith(".router"):
            bundles[:] = self._encode_router(tensor)[first : first + len(bundles)]
            return
        pool = self._pool(tensor)
        at = self._turn % len(pool)
        self._turn += STEP
        done = 0
        while done < len(bundles):
            count = min(len(pool) - at, len(bundles) - done)
            bundles[done : done + count] = pool[at : at + count]
            done, at = done + count, 0

    def _pool(self, tensor: TensorLayout) -> Array:
        key = (tensor.name.rpartition(".")[2], tensor.columns, tensor.bundle_rows)
        if key not in self._pools:
            self._pools[key] = self._encode_pool(tensor)
        return self._pools[key]

    def _encode_pool(self, tensor: TensorLayout) -> Array:
        """uint8 [bundles, stride]."""
        bundles = max(POOL_WEIGHTS // (tensor.columns * tensor.bundle_rows), 1)
        if tensor.bundle_rows == MATRIX_ROWS:
            rows = self.source.matrix_rows(tensor.name, 0, bundles * MATRIX_ROWS)
            parts = [rows[r::MATRIX_ROWS] for r in range(MATRIX_ROWS)]
        else:
            parts = [p for p in self.source.neuron_rows(tensor.name, 0, 0, bundles) if p is not None]
        return self._encode(tensor, parts)

    def _encode_router(self, tensor: TensorLayout) -> Array:
        """All of a skewed router, uint8 [bundles, stride]."""
        rows = np.zeros((tensor.bundles * MATRIX_ROWS, tensor.columns), np.float32)
        weights = self.source.router_rows(int(tensor.name.partition(".")[0]))
        rows[: len(weights)] = weights
        return self._encode(tensor, [rows[r::MATRIX_ROWS] for r in range(MATRIX_ROWS)])

    def _encode(self, tensor: TensorLayout, parts: Sequence[Array]) -> Array:
        """uint8 [bundles, stride]; parts[r], float32 [bundles, columns], holds row r of every bundle."""
        bundles, size = len(parts[0]), row_bytes(tensor.codec, tensor.columns)
        pool = np.zeros((bundles, tensor.stride), np.uint8)
        for r, weights in enumerate(parts):
            encoded = np.empty((bundles, size), np.uint8)
            self._kernels.quantize(self._wrap(np.ascontiguousarray(weights)), tensor.codec, self._wrap(encoded))
            pool[:, r * size : (r + 1) * size] = encoded
        return pool


def _quantizer() -> tuple[Any, Any]:
    """A backend and what turns a numpy array into its own: the compiled one, or torch where there is none."""
    try:
        return ops.load("cpu"), lambda array: array
    except ops.BackendUnavailable:
        import torch

        return ops.load("torch"), torch.from_numpy


def byte_tokenizer() -> bytes:
    """tokenizer.json of 256 tokens, one a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return str(tokenizer.to_str()).encode()


def random_labels(pack: Pack, seed: int) -> KvLabels:
    """Labels of keys for sparse attention, by random products: as fast as fitted ones, and as wide."""
    random = np.random.default_rng(seed)
    layers: list[LayerLabels | None] = []
    for i in range(len(pack.spec.layers)):
        attention = pack.spec.attentions.get(i)
        channels = None if attention is None else most_channels(attention)
        if attention is None or channels is None:
            layers.append(None)
            continue
        keys = random.normal(size=(attention.kv_heads, channels, attention.head_dim)).astype(np.float32)
        keys /= np.linalg.norm(keys, axis=2, keepdims=True)
        low = np.full((attention.kv_heads, channels), -LABEL_RANGE, np.float32)
        layers.append(LayerLabels(keys, keys, low, low * np.float32(-2 / (LABEL_CODES - 1))))
    shares = tuple(() if own is None else (1.0,) * len(own.keys) for own in layers)
    return KvLabels(pack.manifest.hash, LABEL_BLOCK, tuple(layers), shares)


def make(
    out: Path,
    name: str,
    shape: Shape,
    dtype: Codec,
    seed: int = 0,
    progress: Any = None,
    router_skew: float = 0.0,
) -> Manifest:
    """Write the pack; see the packer for what it raises."""
    source = SyntheticSource(name, shape.spec(), seed, router_skew)
    report = progress or (lambda file, done, total: None)
    return pack(source, out, dtype, progress=report, encoder=TiledEncoder(source))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--dtype", choices=[c.value for c in DTYPES], default=Codec.INT4.value)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--router-skew", type=float, default=0.0, metavar="S", help="0: all experts alike")
    parser.add_argument("--kv-labels", action="store_true", help="labels of keys too, for --kv sparse")
    numbers = list(Shape.__dataclass_fields__)
    for field in numbers:
        parser.add_argument(f"--{field.replace('_', '-')}", type=int, metavar="N", help="in place of the preset's")
    args = parser.parse_args()
    given = {field: getattr(args, field) for field in numbers if getattr(args, field) is not None}
    shape = replace(PRESETS[args.preset], **given)
    if shape.vocab < 256:
        parser.error(f"a vocabulary of {shape.vocab} is too small for one token a byte")

    shown = -1

    def progress(file: str, done: int, total: int) -> None:
        nonlocal shown
        if (percent := math.floor(100 * done / total)) > shown:
            shown = percent
            print(f"\r{percent:3d}%  {done / 1e9:.1f} of {total / 1e9:.1f} GB  {file}", end="", file=sys.stderr)

    began = time.perf_counter()
    try:
        manifest = make(args.out, args.preset, shape, Codec(args.dtype), args.seed, progress, args.router_skew)
        if args.kv_labels:
            written = Pack(args.out)
            write_labels(args.out, random_labels(written, args.seed), written.spec)
    except FlashrtError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    print(file=sys.stderr)
    spec, nbytes = manifest.spec, manifest.layout.nbytes
    print(
        json.dumps(
            {
                "parameters": spec.parameters,
                "bytes": nbytes,
                "bits_per_weight": round(8 * nbytes / spec.parameters, 3),
                "seconds": round(time.perf_counter() - began, 1),
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
