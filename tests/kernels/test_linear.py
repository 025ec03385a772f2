import numpy as np
import pytest
import torch

from flashrt_kernels.rows import Codec

from .helpers import (
    CODECS,
    HALF_GEMM,
    as_met,
    cpu,
    empty,
    matrix,
    normal,
    reference,
    rms_ratio,
    same,
    tensor,
    tolerance,
)


def expect(x, w, codec, rows, bias=None):
    out = torch.full((x.shape[0], rows), torch.nan)
    reference.linear(tensor(x), tensor(w), codec, out, 0, rows, tensor(bias))
    return out.numpy()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("k", "rows"), [(48, 5), (63, 8), (160, 12), (224, 9), (640, 83), (1536, 31)])
def test_linear_matches_reference(isa, codec, k, rows):
    w = matrix(1, rows, k, codec)
    bias = normal(3, rows)
    for tokens in (1, 2, 3, 5, 8, 16, 19):
        x = normal(2, tokens, k)
        out = empty(tokens, rows)
        cpu.linear(x, w, codec, out, 0, rows, bias)
        assert rms_ratio(out, expect(as_met(x, codec), w, codec, rows, bias)) < tolerance(codec)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("k", "rows"), [(48, 5), (63, 8), (640, 83), (1536, 130)])
@pytest.mark.parametrize("tokens", [17, 63, 123])
def test_gemm_linear_matches_reference(isa, codec, k, rows, tokens):
    w, x, bias = matrix(1, rows, k, codec), normal(2, tokens, k), normal(3, rows)
    out = empty(tokens, rows)
    cpu.gemm_linear(x, w, codec, out, 0, rows, bias)
    exact = codec is Codec.F32 or isa not in HALF_GEMM
    assert rms_ratio(out, expect(x, w, codec, rows, bias)) < (2e-6 if exact else 5e-3)


@pytest.mark.parametrize("codec", [Codec.F32, Codec.INT4])
def test_gemm_linear_blocks_long_rows(isa, codec):
    """Rows longer than one packed panel are multiplied in several, without a change of order."""
    k, rows, tokens = 5000, 70, 18
    w, x = matrix(1, rows, k, codec), normal(2, tokens, k)
    out = empty(tokens, rows)
    cpu.gemm_linear(x, w, codec, out, 0, rows)
    assert rms_ratio(out, expect(x, w, codec, rows)) < (5e-6 if codec is Codec.F32 or isa not in HALF_GEMM else 5e-3)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("k", [63, 1536])
def test_linear_is_invariant(isa, codec, k):
    rows, tokens = 171, 16
    w, x = matrix(1, rows, k, codec), normal(2, tokens, k)
    whole = empty(tokens, rows)
    cpu.linear(x, w, codec, whole, 0, rows)
    for batch in (1, 2, 3, 5, 8):
        for first in range(0, tokens - batch + 1, batch):
            out = empty(batch, rows)
            cpu.linear(x[first : first + batch].copy(), w, codec, out, 0, rows)
            assert same(out, whole[first : first + batch])
    split = empty(tokens, rows)
    cpu.set_threads(1)
    cpu.linear(x, w[:9], codec, split, 0, 72)
    cpu.set_threads(3)
    cpu.linear(x, w[9:], codec, split, 72, rows - 72)
    assert same(split, whole)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("k", [63, 1536])
def test_gemm_linear_is_invariant(isa, codec, k):
    rows, tokens = 171, 63
    w, x = matrix(1, rows, k, codec), normal(2, tokens, k)
    whole = empty(tokens, rows)
    cpu.gemm_linear(x, w, codec, whole, 0, rows)
    for first, last in ((0, 17), (17, 18), (18, 63), (5, 40)):
        out = empty(last - first, rows)
        cpu.gemm_linear(x[first:last].copy(), w, codec, out, 0, rows)
        assert same(out, whole[first:last])
    split = empty(tokens, rows)
    cpu.set_threads(1)
    cpu.gemm_linear(x, w[:8], codec, split, 0, 64)
    cpu.set_threads(3)
    cpu.gemm_linear(x, w[8:], codec, split, 64, rows - 64)
    assert same(split, whole)


@pytest.mark.parametrize("call", [cpu.linear, cpu.gemm_linear])
def test_views_are_used_in_place(call):
    """x, bundles and out may lie inside larger arrays; nothing around the result is touched."""
    k, rows, tokens, codec = 96, 21, 4, Codec.INT8
    w, x = matrix(1, rows, k, codec), normal(2, tokens, 2 * k)
    wide = np.full((w.shape[0], w.shape[1] + 192), 0xAA, np.uint8)
    wide[:, 64 : 64 + w.shape[1]] = w
    out = empty(tokens, 50)
    call(x[:, k:], wide[:, 64 : 64 + w.shape[1]], codec, out[:, :40], 3, rows)
    expected = empty(tokens, rows)
    call(x[:, k:].copy(), w, codec, expected, 0, rows)
    assert same(out[:, 3 : 3 + rows].copy(), expected)
    assert np.isnan(out[:, :3]).all()
    assert np.isnan(out[:, 3 + rows :]).all()


@pytest.mark.parametrize("call", [cpu.linear, cpu.gemm_linear])
def test_bundles_may_be_the_same_one(call):
    w, x = matrix(1, 8, 96, Codec.INT4), normal(2, 3, 96)
    out, expected = empty(3, 24), empty(3, 8)
    call(x, np.broadcast_to(w, (3, w.shape[1])), Codec.INT4, out, 0, 24)
    call(x, w, Codec.INT4, expected, 0, 8)
    assert same(out, np.tile(expected, 3))


@pytest.mark.parametrize("codec", CODECS)
def test_not_a_number_is_not_lost(codec):
    x, w = normal(1, 2, 100), matrix(2, 8, 100, codec)
    x[1, 7] = np.nan
    out = empty(2, 8)
    cpu.linear(x, w, codec, out, 0, 8)
    assert np.isfinite(out[0]).all()
    assert np.isnan(out[1]).all()


def test_extreme_activations():
    """Zeros, and numbers far apart in size within one token."""
    k, codec = 256, Codec.INT8
    w, x = matrix(1, 16, k, codec), np.zeros((3, k), np.float32)
    x[1, ::2] = 1e-35
    x[2, :64] = 1e20
    x[2, 64:] = 1e-3
    out = empty(3, 16)
    cpu.linear(x, w, codec, out, 0, 16)
    assert (out[0] == 0).all()
    assert np.abs(out[1]).max() < 1e-30
    assert rms_ratio(out[2], expect(x[2:], w, codec, 16)[0]) < tolerance(codec)


@pytest.mark.parametrize("call", [cpu.linear, cpu.gemm_linear])
def test_wrong_arguments_are_named(call):
    codec = Codec.INT4
    w, x, out = matrix(1, 16, 64, codec), normal(1, 2, 64), empty(2, 16)
    readonly = out.copy()
    readonly.flags.writeable = False
    for name, arguments in {
        "x": (x.astype(np.float64), w, codec, out, 0, 16),
        "x:": (x.T.copy().T, w, codec, out, 0, 16),
        "bundles": (x, w[:, :100], codec, out, 0, 16),
        "bundles:": (x, w.view(np.int8), codec, out, 0, 16),
        "out": (x, w, codec, empty(3, 16), 0, 16),
        "out:": (x, w, codec, out, 1, 16),
        "out: read-only": (x, w, codec, readonly, 0, 16),
        "rows": (x, w, codec, out, 0, 17),
        "out: ": (x, w, codec, out, 2**63 - 1, 16),
        "bias": (x, w, codec, out, 0, 16, normal(1, 15)),
        "codec": (x, w, "int4", out, 0, 16),
    }.items():
        with pytest.raises(ValueError, match=f"^{name.rstrip(': ')}"):
            call(*arguments)
    with pytest.raises(ValueError, match="^scratch"):
        cpu.gemm_linear(x, w, codec, out, 0, 16, scratch=np.empty(10, np.uint8))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("heads", "k", "each"), [(1, 13, 8), (5, 100, 24), (3, 576, 72), (7, 128, 512)])
def test_by_head_has_the_bits_of_each_head(isa, codec, heads, k, each):
    """Wherever calls are cut, within heads too; nothing around the result is touched."""
    rows = heads * each
    w = matrix(1, rows, k, codec)
    for tokens, threads in ((1, 2), (16, 3), (19, 1)):
        cpu.set_threads(threads)
        x, out = normal(2, tokens, heads, k + 3)[:, :, 3:], empty(tokens, heads, each + 5)
        cut = rows // 3 // 8 * 8
        for row0, last in ((0, cut), (cut, rows)):
            cpu.linear_by_head(x, w[row0 // 8 :], codec, out[:, :, :each], row0, last - row0)
        whole, expected = empty(tokens, heads, each), torch.empty(tokens, heads, each)
        for head in range(heads):
            cpu.linear(x[:, head].copy(), w[head * each // 8 :], codec, whole[:, head], 0, each)
        assert same(out[:, :, :each].copy(), whole)
        assert np.isnan(out[:, :, each:]).all()
        met = as_met(x.reshape(-1, k), codec).reshape(x.shape)
        reference.linear_by_head(torch.from_numpy(met), torch.from_numpy(w), codec, expected, 0, rows)
        assert rms_ratio(whole, expected) < tolerance(codec)


def test_wrong_arguments_of_heads_are_named():
    good = {"x": normal(1, 2, 3, 40), "bundles": matrix(1, 48, 40, Codec.INT8), "codec": Codec.INT8}
    good |= {"out": empty(2, 3, 16), "row0": 8, "rows": 40}
    for name, wrong in [
        ("x", normal(1, 2, 3, 577)),
        ("out", empty(2, 4, 16)),
        ("out", empty(2, 3, 12)),
        ("row0", 4),
        ("row0", -8),
        ("rows", 41),
        ("rows", 48),
        ("bundles", np.empty((6, 64), np.uint8)),
    ]:
        with pytest.raises(ValueError, match=f"^{name}"):
            cpu.linear_by_head(**good | {name: wrong})
