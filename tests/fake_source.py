"""A checkpoint that needs no files: weights by arithmetic, so that packs made of it have known bytes.

Every weight is a multiple of 1/8 between -2 and 2, exact in float32 and bfloat16 alike.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from flashrt.rope import Rope
from flashrt.spec import Attention, Ffn, Layer, ModelSpec

DENSE = ModelSpec(
    family="dense",
    vocab=37,
    hidden=20,
    layers=(
        Layer(Attention(3, 1, 6, 0.4, Rope(1e4), qkv_bias=True, qk_norm=True), Ffn(70, "silu")),
        Layer(Attention(3, 1, 6, 0.4, Rope(1e4), window=5, qkv_bias=True, qk_norm=True), Ffn(70, "silu")),
    ),
    context=64,
    post_norms=True,
    tied=True,
    bos=1,
    eos=(2, 3),
)
UNGATED = ModelSpec(
    family="ungated",
    vocab=41,
    hidden=65,
    layers=(Layer(Attention(5, 5, 13, 0.3, qkv_bias=True, out_bias=True), Ffn(9, "relu", gated=False, bias=True)),),
    context=16,
    norm="layer",
    positions=18,
    position_offset=2,
)
MOE = ModelSpec(
    family="moe",
    vocab=8,
    hidden=72,
    layers=(
        Layer(Attention(2, 2, 8, 0.35, Rope(1e6)), Ffn(5, "silu")),
        Layer(Attention(2, 2, 8, 0.35, Rope(1e6)), Ffn(11, "silu", experts=3, experts_per_token=2)),
    ),
    context=32,
)
SPECS = {"dense": DENSE, "ungated": UNGATED, "moe": MOE}


def pattern(key: str, rows: int, columns: int, first: int = 0) -> np.ndarray:
    """float32 [rows, columns]; row r is row `first + r` of the endless matrix `key`."""
    r = np.arange(first, first + rows, dtype=np.int64)[:, None]
    c = np.arange(columns, dtype=np.int64)[None, :]
    return (((zlib.crc32(key.encode()) % 101 + 7 * r + 3 * c + r * c) % 33 - 16) / 8).astype(np.float32)


@dataclass
class FakeSource:
    """A WeightSource over `pattern`."""

    spec: ModelSpec
    name: str = "fake"
    source: str = "nowhere"
    fingerprint: str = "f"
    tokenizer: bytes = b"{}"

    def vector(self, key: str) -> np.ndarray:
        return pattern(key, 1, self.spec.vectors()[key])[0]

    def matrix_rows(self, key: str, start: int, stop: int) -> np.ndarray:
        shapes = self.spec.shared_matrices() | self.spec.layer_matrices(_layer(key))
        rows, columns = shapes[key]
        assert 0 <= start < stop <= rows
        return pattern(key, stop - start, columns, start)

    def neuron_rows(
        self, key: str, run: int, start: int, stop: int
    ) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
        layer, prefix = _layer(key), key.removesuffix(".ffn")
        ffn = self.spec.layers[layer].ffn
        assert 0 <= start < stop <= self.spec.layer_neurons(layer)[key][1]
        gate, up, down = (
            pattern(f"{prefix}.{run}.{part}", stop - start, self.spec.hidden, start) for part in ("gate", "up", "down")
        )
        return (gate if ffn.gated else None), up, down

    def text_files(self) -> dict[str, bytes]:
        return {"tokenizer.json": self.tokenizer, "text.json": b"{}"}


def _layer(key: str) -> int:
    head = key.partition(".")[0]
    return int(head) if head.isdigit() else 0
