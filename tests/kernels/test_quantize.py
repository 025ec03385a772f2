import struct

import numpy as np
import pytest
import torch

from flashrt_kernels.rows import Codec, row_bytes

from . import int4_search
from .helpers import CODECS, cpu, empty, normal, reference, rms_ratio, same


def encode(weights, codec, importance=None):
    rows = np.full((weights.shape[0], row_bytes(codec, weights.shape[1])), 0xEE, np.uint8)
    cpu.quantize(weights, codec, rows, importance)
    return rows


def decode(rows, codec, k):
    out = empty(rows.shape[0], k)
    cpu.dequantize(rows, codec, k, out)
    return out


def round_to_nearest(w):
    """int4 with the range of each group of 32 split evenly, scale and offset in full precision."""
    groups = w.reshape(-1, 32)
    low, high = groups.min(1, keepdims=True), groups.max(1, keepdims=True)
    scale = (high - low) / 15
    return (np.round((groups - low) / scale) * scale + low).reshape(w.shape)


def test_golden_int8():
    """k = 3: the largest weight gets 127, the scale is bfloat16 rounded up, the rest of the chunk is zero."""
    row = encode(np.array([[-127.0, 63.0, 0.4]], np.float32), Codec.INT8)[0].tobytes()
    assert row == bytes([0x81, 63, 0]) + bytes(61) + struct.pack("<H", 0x3F80)


def test_golden_int4():
    """A row written by hand: w = (u * a) * q - (v * b), the codes of a span of two groups."""
    codes = bytearray(32)
    codes[0] = 3 | 15 << 4  # weights 0 and 8 of group 0
    codes[15] = 1 | 2 << 4  # weights 7 and 15 of group 1
    codes[16 + 3] = 9 << 4  # weight 24 + 3 of group 0
    row = bytes(codes) + bytes([2, 4]) + bytes([1, 3]) + struct.pack("<ff", 0.5, 0.25)
    expected = np.concatenate((np.full(32, -0.25), np.full(32, -0.75))).astype(np.float32)
    expected[[0, 8, 27]] += np.array([3, 15, 9]) * 0.5 * 2
    expected[[32 + 7, 32 + 15]] += np.array([1, 2]) * 0.5 * 4
    rows = np.frombuffer(row, np.uint8)[None]
    assert rows.shape[1] == row_bytes(Codec.INT4, 64)
    assert np.array_equal(decode(rows, Codec.INT4, 64)[0], expected)
    out = torch.empty(1, 64)
    reference.dequantize(torch.from_numpy(rows.copy()), Codec.INT4, 64, out)
    assert np.array_equal(out.numpy()[0], expected)


def test_golden_int4_encoding():
    """Weights that are on a grid come back exactly: 0..15 in steps of u * 255 = 1, no offset."""
    w = np.arange(64, dtype=np.float32)[None] % 16
    row = encode(w, Codec.INT4)[0]
    assert [int(b) for b in row[:32]] == [i % 8 | (i % 8 + 8) << 4 for i in range(32)]
    assert list(row[32:36]) == [255, 255, 0, 0]
    assert struct.unpack("<ff", row[36:].tobytes()) == (pytest.approx(1 / 255), 0.0)


def test_golden_floats():
    w = np.array([[1.0, -2.5, 1.00390625]], np.float32)  # the last is halfway between two bfloat16: to even
    assert encode(w, Codec.F32)[0].tobytes() == w.tobytes() + bytes(61 * 4)
    assert encode(w, Codec.BF16)[0].tobytes() == struct.pack("<HHH", 0x3F80, 0xC020, 0x3F80) + bytes(61 * 2)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("n", "k"), [(1, 48), (5, 63), (33, 640), (7, 1536)])
def test_decoding_matches_reference(isa, codec, n, k):
    rows = encode(normal(1, n, k), codec)
    expected = torch.empty(n, k)
    reference.dequantize(torch.from_numpy(rows), codec, k, expected)
    assert rms_ratio(decode(rows, codec, k), expected) < 1e-7
    wide = np.zeros((n, rows.shape[1] + 13), np.uint8)
    wide[:, : rows.shape[1]] = rows
    assert same(decode(wide[:, : rows.shape[1]], codec, k), decode(rows, codec, k))


@pytest.mark.parametrize("codec", [Codec.F32, Codec.BF16, Codec.INT8])
@pytest.mark.parametrize("k", [48, 63, 640])
def test_encoding_matches_reference_byte_by_byte(isa, codec, k):
    w = normal(1, 9, k)
    expected = torch.zeros(9, row_bytes(codec, k), dtype=torch.uint8)
    reference.quantize(torch.from_numpy(w), codec, expected)
    assert np.array_equal(encode(w, codec), expected.numpy())


def test_int8_error(isa):
    w = normal(1, 16, 1024)
    found = decode(encode(w, Codec.INT8), Codec.INT8, 1024)
    top = np.abs(w.reshape(16, -1, 64)).max(2).repeat(64, 1)
    assert (np.abs(found - w) <= top / 127 * 0.5 * 1.01).all()  # nothing clips; the scale is at most 2^-7 too large


@pytest.mark.parametrize("kind", ["normal", "laplace", "outliers"])
def test_int4_error_is_well_below_rounding_to_nearest(isa, kind):
    rng = np.random.default_rng(5)
    w = {
        "normal": rng.standard_normal((32, 1024)),
        "laplace": rng.laplace(size=(32, 1024)),
        "outliers": rng.standard_normal((32, 1024)) * np.exp(rng.standard_normal(1024)),
    }[kind].astype(np.float32)
    error = rms_ratio(decode(encode(w, Codec.INT4), Codec.INT4, 1024), w)
    assert error < 0.93 * rms_ratio(round_to_nearest(w), w)
    coarse = torch.zeros(32, row_bytes(Codec.INT4, 1024), dtype=torch.uint8)
    reference.quantize(torch.from_numpy(w), Codec.INT4, coarse)
    assert error < 1.005 * rms_ratio(decode(coarse.numpy(), Codec.INT4, 1024), w)


def test_importance_lowers_the_error_where_it_counts(isa):
    w = normal(1, 64, 256)
    importance = np.ones(256, np.float32)
    importance[::8] = 50
    plain, weighted = (decode(encode(w, Codec.INT4, i), Codec.INT4, 256) for i in (None, importance))

    def loss(found):
        return float((np.square(found - w) * importance).sum())

    assert loss(weighted) < 0.9 * loss(plain)


def weights_of(kind, n, k):
    rng = np.random.default_rng(k)
    w = rng.standard_normal((n, k))
    return {
        "normal": w,
        "one sign": np.abs(w) * np.where(np.arange(n) % 2, 1, -1)[:, None],
        "outliers": w * np.exp(2 * rng.standard_normal((n, k))),
        "few values": np.round(2 * w) / 2,
        "mostly zero": w * (rng.random((n, k)) > 0.8),
        "tiny": w * 1e-36,
    }[kind].astype(np.float32)


@pytest.mark.parametrize("kind", ["normal", "one sign", "outliers", "few values", "mostly zero", "tiny"])
@pytest.mark.parametrize("weighted", [False, True])
def test_int4_is_the_search_that_is_written_down(isa, kind, weighted):
    """Byte by byte, at lengths that fill lanes, groups and spans or do not. Plain code rounds once more."""
    for n, k in ((1, 1), (37, 33), (19, 64), (3, 100), (5, 640), (9, 1536)):
        w = weights_of(kind, n, k)
        importance = np.abs(normal(2, k)) if weighted else None
        found, expected = encode(w, Codec.INT4, importance), int4_search.encode(w, importance)
        if isa == "scalar":
            errors = [float(np.square(decode(x, Codec.INT4, k) - w).sum()) for x in (found, expected)]
            assert errors[0] <= 1.01 * errors[1]
        else:
            assert np.array_equal(found, expected)


@pytest.mark.parametrize("codec", CODECS)
def test_degenerate_rows(isa, codec):
    w = np.zeros((6, 100), np.float32)
    w[1] = 3.0
    w[2] = -3.0
    w[3, 50] = 1e-30
    w[4, :32] = 1e4  # one large group in a row of zeros
    w[5] = 1e-3
    w[5, 99] = 1.0
    found = decode(encode(w, codec), codec, 100)
    assert (found[0] == 0).all()
    assert np.allclose(found[1:3], w[1:3], rtol=1e-2)
    assert np.allclose(found[4], w[4], rtol=1e-2, atol=1e-3)
    assert np.abs(found[5] - w[5]).max() < 0.05


@pytest.mark.parametrize("codec", CODECS)
def test_encoding_does_not_depend_on_threads(isa, codec):
    w = normal(1, 67, 640)
    cpu.set_threads(1)
    one = encode(w, codec)
    cpu.set_threads(3)
    assert np.array_equal(encode(w, codec), one)
    assert np.array_equal(encode(w[30:40].copy(), codec), one[30:40])


def test_wrong_arguments_are_named():
    w, rows = normal(1, 4, 64), np.zeros((4, row_bytes(Codec.INT4, 64)), np.uint8)
    with pytest.raises(ValueError, match="^weights"):
        cpu.quantize(w.astype(np.float64), Codec.INT4, rows)
    with pytest.raises(ValueError, match="^out"):
        cpu.quantize(w, Codec.INT8, rows)
    with pytest.raises(ValueError, match="^importance"):
        cpu.quantize(w, Codec.INT4, rows, normal(1, 63))
    with pytest.raises(ValueError, match="^bundles"):
        cpu.dequantize(rows, Codec.INT8, 64, w)
    with pytest.raises(ValueError, match="^out"):
        cpu.dequantize(rows, Codec.INT4, 64, empty(4, 63))
