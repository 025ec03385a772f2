"""Ranges of rows and columns against the whole tensor, for every stored type."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from flashrt.storage.sources import open_checkpoint, tensors
from flashrt.storage.sources.decoding import Codec
from flashrt.storage.sources.gguf_header import gguf_codec
from flashrt.storage.sources.safetensors_header import read_header
from flashrt.storage.sources.stored import PLAIN_CODECS, stored_tensor
from flashrt.storage.sources.tensors import TensorReader
from tests.families import tiny_gguf

QUANTS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ2_S")


def codec_of(name: str) -> Codec:
    if name in PLAIN_CODECS:
        return PLAIN_CODECS[name]
    from gguf import GGMLQuantizationType

    codec = gguf_codec(GGMLQuantizationType[name])[1]
    assert codec is not None
    return codec


@pytest.mark.parametrize("stack", [0, 3])
@pytest.mark.parametrize("kind", [*PLAIN_CODECS, *QUANTS])
@pytest.mark.parametrize("kept", [tensors.CACHE_BYTES, 4000, 0])
def test_ranges(kind: str, stack: int, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole matrices are kept while their columns are read, or stripes of them, or what was asked for."""
    monkeypatch.setattr(tensors, "CACHE_BYTES", kept)
    codec, rows, columns = codec_of(kind), 7, 768
    shape = (stack, rows, columns) if stack else (rows, columns)
    size = int(np.prod(shape)) // codec.block * codec.bytes
    raw = np.random.default_rng(6).integers(0, 256, size, dtype=np.uint8)
    path = tmp_path / "data"
    path.write_bytes(b"x" * 13 + raw.tobytes())
    reader = TensorReader({"t": stored_tensor("t", shape, kind, codec, path, 13, size)})
    with np.errstate(all="ignore"):  # random bytes make infinite scales
        whole = codec.decode(raw.reshape(-1, columns // codec.block * codec.bytes)).reshape(-1, rows, columns)
        for expert in range(stack) if stack else (None,):
            expected = whole[expert or 0]
            np.testing.assert_array_equal(reader.rows("t", 2, 5, expert), expected[2:5])
            for start, stop in ((0, 1), (31, 33), (33, 300), (250, 600), (767, 768), (0, 768), (5, 6)):
                found = reader.columns("t", start, stop, expert)
                assert found.dtype == np.float32
                np.testing.assert_array_equal(found, expected[:, start:stop].T)
    reader.close()


@pytest.mark.parametrize("quant", ["F16", "BF16", "Q8_0"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_quantized_gguf(family: str, quant: str, tmp_path: Path) -> None:
    """Shapes whose rows are whole blocks: every matrix is close to the model's, permutation undone."""
    fields = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 16}
    exact = tiny_gguf(family, tmp_path / "exact.gguf", quant="F32", **fields)[1]
    rough = tiny_gguf(family, tmp_path / "rough.gguf", quant=quant, **fields)[1]
    with open_checkpoint(exact) as a, open_checkpoint(rough) as b:
        b.validate()
        assert b.weight_bytes_source < a.weight_bytes_source * 0.6
        pairs = [(a.matrix_rows("1.qkv", 3, 150), b.matrix_rows("1.qkv", 3, 150))]
        pairs += zip(a.neuron_rows("1.ffn", 1, 5, 77), b.neuron_rows("1.ffn", 1, 5, 77), strict=True)
        for x, y in pairs:
            assert x is not None
            assert y is not None
            assert 0 < np.square(x - y).mean() ** 0.5 / np.square(x).mean() ** 0.5 < 0.01


@pytest.mark.parametrize("room", [1, 3])
def test_what_is_kept_is_bounded(room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 72 * 40 * 4
    monkeypatch.setattr(tensors, "CACHE_BYTES", room * size + 5)
    path = tiny_gguf("mixtral", tmp_path / "tiny.gguf")[1]
    with open_checkpoint(path) as checkpoint:
        for layer in range(3):
            for expert in range(5):
                checkpoint.neuron_rows(f"{layer}.ffn", expert, 0, 3)
        assert [stripe.raw.nbytes for stripe in checkpoint.reader._stripes] == [size] * room


@pytest.mark.parametrize("share", [0.3, 0.52, 0.9])  # of what is kept, that each of two matrices takes
def test_matrices_whose_columns_are_read_in_turn_are_read_once(
    share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As gate and up of GPTQ and AWQ are, whose rows are columns of what is stored."""
    rows, columns = 64, 512
    save_file({name: np.ones((rows, columns), np.float32) for name in "ab"}, tmp_path / "m.safetensors")
    kept = int(rows * columns * 4 / share)
    monkeypatch.setattr(tensors, "STRIPE_BYTES", kept * tensors.STRIPE_BYTES // tensors.CACHE_BYTES)
    monkeypatch.setattr(tensors, "CACHE_BYTES", kept)
    read: list[int] = []
    plain = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda file, parts, at: read.append(sum(map(len, parts))) or plain(file, parts, at)
    )
    reader = TensorReader(read_header(tmp_path / "m.safetensors")[0])
    for start in range(0, columns, 8):
        for name in "ab":
            reader.columns(name, start, start + 8)
    reader.close()
    assert 0 < sum(read) <= 1.05 * 2 * rows * columns * 4
