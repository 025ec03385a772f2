"""Numbers as checkpoints store them, against the gguf package and numpy, on random bytes: bit by bit."""

import gguf
import numpy as np
import pytest

from flashrt_kernels.cpu import _cpu, stored
from flashrt_kernels.stored import STORED

from .helpers import cpu

PLAIN = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}


def random_rows(name, rows, blocks, seed=0):
    """Stored rows of every code there is; scales stay finite, so that numbers can be compared."""
    kind, rng = STORED[name], np.random.default_rng(seed)
    if name in PLAIN:
        numbers = rng.standard_normal((rows, blocks)) * 10.0 ** rng.integers(-7, 4, (rows, blocks))
        return numbers.astype(PLAIN[name]).view(np.uint8)
    raw = rng.integers(0, 256, (rows, blocks, kind.nbytes), dtype=np.uint8)
    if name == "BF16":
        return (
            (rng.standard_normal((rows, blocks)).astype(np.float32).view(np.uint32) >> 16).astype("<u2").view(np.uint8)
        )
    scales = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "MXFP4": ()}
    for at in scales.get(name, (0, 2) if name in ("Q4_1", "Q5_1") else (0,)):
        half = rng.standard_normal((rows, blocks)) * 10.0 ** rng.integers(-6, 2, (rows, blocks))
        raw[:, :, at : at + 2] = half.astype("<f2")[:, :, None].view(np.uint8)
    return raw.reshape(rows, -1)


def decoded(name, raw):
    if name in PLAIN:
        return raw.view(PLAIN[name]).astype(np.float32)
    return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])


def same_bits(a, b):
    return np.array_equal(np.ascontiguousarray(a).view(np.uint32), np.ascontiguousarray(b).view(np.uint32))


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (67, 3), (5, 11)])
def test_rows(isa, name, rows, blocks):
    raw = random_rows(name, rows, blocks)
    out = np.full((rows, blocks * STORED[name].numbers), np.nan, np.float32)
    stored.decode_rows(name, raw, out)
    assert same_bits(out, decoded(name, raw))
    wide = np.zeros((rows, raw.shape[1] + 3), np.uint8)
    wide[:, : raw.shape[1]] = raw
    again = np.empty_like(out)
    stored.decode_rows(name, wide[:, : raw.shape[1]], again)
    assert same_bits(again, out)


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("threads", [1, 3])
def test_columns(isa, name, threads):
    cpu.set_threads(threads)
    raw = random_rows(name, 71, 9)
    whole = decoded(name, raw)
    for start, stop in ((0, whole.shape[1]), (1, 2), (5, whole.shape[1] - 1), (whole.shape[1] - 1, whole.shape[1])):
        if start < stop:
            out = np.full((stop - start, 71), np.nan, np.float32)
            stored.decode_columns(name, raw, start, stop, out)
            assert same_bits(out, whole[:, start:stop].T)


@pytest.mark.parametrize("at", [0, 77, -1])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_finite(isa, at, bad):
    values = np.random.default_rng(0).standard_normal((3, 300_001)).astype(np.float32)
    assert stored.finite(values)
    values.reshape(-1)[at] = bad
    assert not stored.finite(values)
    assert stored.finite(np.full((2, 3), np.finfo(np.float32).max))


def test_the_table_agrees_with_the_gguf_package():
    for name, kind in STORED.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == (kind.numbers, kind.nbytes)


def test_wrong_arguments_are_named():
    raw, out = random_rows("Q4_K", 2, 2), np.empty((2, 512), np.float32)
    with pytest.raises(ValueError, match="^raw: expected rows of whole blocks of 144 bytes"):
        stored.decode_rows("Q4_K", raw[:, :-1], out)
    with pytest.raises(ValueError, match="^out"):
        stored.decode_rows("Q4_K", raw, out[:, 1:])
    with pytest.raises(ValueError, match="^start"):
        stored.decode_columns("Q4_K", raw, 5, 513, np.empty((508, 2), np.float32))
    with pytest.raises(ValueError, match="^stored"):
        _cpu.stored_rows(raw, len(STORED), out)
    with pytest.raises(KeyError):
        stored.decode_rows("IQ1_S", raw, out)
