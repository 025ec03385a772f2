"""Kept codecs against the gguf package, and kernels on them against the weights that it decodes."""

import numpy as np
import pytest
import torch

from flashrt_kernels.ffn import FfnWeights, RoutedTokens
from flashrt_kernels.rows import KEPT, MATRIX_ROWS, Codec, NeuronCodecs, align, neuron_bytes, row_bytes

from .helpers import HALF_GEMM, cpu, empty, normal, reference, rms_ratio, same
from .kept import as_gguf, kept_rows

CODECS = list(KEPT)


def widths(codec: Codec) -> tuple[int, ...]:
    """Odd numbers of blocks, in whole spans of 256 weights and not."""
    step = KEPT[codec].weights
    return step, 3 * step, 5 * step, 20 * step


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("n", [1, 7, 33])
def test_the_reference_decodes_as_the_gguf_package_does(codec, n):
    for k in widths(codec):
        rows = kept_rows(n + k, n, k, codec)
        found = torch.empty(n, k)
        reference.dequantize(torch.from_numpy(rows), codec, k, found)
        assert same(found.numpy(), as_gguf(rows, codec))


@pytest.mark.parametrize("codec", CODECS)
def test_rows_are_whole_blocks(codec):
    with pytest.raises(ValueError, match=f"not whole blocks of {codec.value}"):
        row_bytes(codec, KEPT[codec].weights + 16)


def test_every_scale_of_mxfp4():
    rows = np.zeros((253, 17), np.uint8)  # larger ones reach infinity
    rows[:, 0] = np.arange(253)
    rows[:, 1:] = np.arange(16) * 17
    found = torch.empty(253, 32)
    reference.dequantize(torch.from_numpy(rows), Codec.MXFP4, 32, found)
    assert same(found.numpy(), as_gguf(rows, Codec.MXFP4))


@pytest.mark.parametrize("codec", CODECS)
def test_dequantize_gives_the_bits_of_the_gguf_package(isa, codec):
    for k in widths(codec):
        for n in (1, 7, 33):
            rows, found = kept_rows(n + k, n, k, codec), empty(n, k)
            cpu.dequantize(rows, codec, k, found)
            assert same(found, as_gguf(rows, codec))


@pytest.mark.parametrize("codec", CODECS)
def test_linear(isa, codec):
    for k in widths(codec):
        rows = kept_rows(k, 19, k, codec)
        weights, held = as_gguf(rows, codec), in_bundles(rows)
        for tokens in (1, 2, 3, 5, 16, 21):
            x, out, bias = normal(tokens, tokens, k), empty(tokens, 19), normal(3, 19)
            cpu.linear(x, held, codec, out, 0, 19, bias)
            assert rms_ratio(out - bias, x.astype(np.float64) @ weights.T) < 3e-4


@pytest.mark.parametrize("codec", CODECS)
def test_gemm_linear(isa, codec):
    for k in widths(codec):
        rows = kept_rows(k, 75, k, codec)
        x, out = normal(1, 23, k), empty(23, 75)
        cpu.gemm_linear(x, in_bundles(rows), codec, out, 0, 75)
        assert rms_ratio(out, x @ as_gguf(rows, codec).T) < (1e-2 if isa in HALF_GEMM else 3e-6)


@pytest.mark.parametrize("codec", CODECS)
def test_a_token_is_alone_in_its_pass(isa, codec):
    k = widths(codec)[2]
    held, x, whole = in_bundles(kept_rows(1, 40, k, codec)), normal(2, 16, k), empty(16, 40)
    cpu.linear(x, held, codec, whole, 0, 40)
    for count in (1, 2, 7):
        out = empty(count, 40)
        cpu.linear(x[-count:].copy(), held, codec, out, 0, 40)
        assert same(out, whole[-count:])


@pytest.mark.parametrize("codec", CODECS)
def test_instruction_sets_give_the_same_bits(codec):
    """Those with fused multiply-adds; plain code rounds twice."""
    isas = [name for name in cpu.available_isas() if name != "scalar"]
    k, results = widths(codec)[2], []
    held, x = in_bundles(kept_rows(1, 24, k, codec)), normal(2, 5, k)
    try:
        for name in isas:
            cpu.force_isa(name)
            out = empty(5, 24)
            cpu.linear(x, held, codec, out, 0, 24)
            results.append(out)
    finally:
        cpu.force_isa(None)
    assert all(same(out, results[0]) for out in results)


def in_bundles(rows: np.ndarray) -> np.ndarray:
    count, size = -(-len(rows) // MATRIX_ROWS), rows.shape[1]
    held = np.full((count, bundle_stride_of(size)), 0xFF, np.uint8)
    full = np.zeros((count * MATRIX_ROWS, size), np.uint8)
    full[: len(rows)] = rows
    held[:, : MATRIX_ROWS * size] = full.reshape(count, -1)
    return held


def bundle_stride_of(size: int) -> int:
    return align(MATRIX_ROWS * size, 64)


UPS = (Codec.Q4_0, Codec.Q5_1, Codec.Q8_0, Codec.Q4_K, Codec.IQ4_XS)
DOWNS = [(codec, 256 if KEPT[codec].weights == 256 else 64) for codec in CODECS]


def grouped(seed: int, bundles: int, k: int, codecs: NeuronCodecs):
    """Bundles of groups of neurons, and their gate, up and down, float32 [neurons, k] each."""
    n = bundles * codecs.group
    up, gate = kept_rows(seed, n, k, codecs.up), None
    parts, weights = [up.reshape(bundles, -1)], [as_gguf(up, codecs.up)]
    if codecs.gate is not None:
        gate = kept_rows(seed + 1, n, k, codecs.gate)
        parts.insert(0, gate.reshape(bundles, -1))
        weights.insert(0, as_gguf(gate, codecs.gate))
    down = kept_rows(seed + 2, bundles * k, codecs.group, codecs.down)
    parts.append(down.reshape(bundles, -1))
    weights.append(as_gguf(down, codecs.down).reshape(bundles, k, -1).transpose(0, 2, 1).reshape(n, k))
    held = np.full((bundles, neuron_bytes(codecs, k) + 37), 0xFF, np.uint8)
    held[:, : neuron_bytes(codecs, k)] = np.concatenate(parts, 1)
    return held, weights


def ffn(
    x: np.ndarray, weights: list[np.ndarray], bias: np.ndarray | None = None, gate_bias: np.ndarray | None = None
) -> np.ndarray:
    """silu(gate x + gate_bias) * (up x + bias), or silu(up x + bias), in float64."""
    x, gated = x.astype(np.float64), len(weights) == 3
    up = x @ weights[-2].astype(np.float64).T + (0 if bias is None else bias)
    inner = x @ weights[0].astype(np.float64).T + (0 if gate_bias is None else gate_bias) if gated else up
    h = inner / (1 + np.exp(-inner))
    return h * up if gated else h


@pytest.mark.parametrize(("down", "group"), DOWNS)
@pytest.mark.parametrize("up", UPS)
def test_glu_of_groups(isa, up, down, group):
    k = 768 if KEPT[up].weights == 256 else 96
    codecs = NeuronCodecs(up, up, down, group)
    held, weights = grouped(1, 11, k, codecs)
    for tokens in (1, 2, 5, 16):
        x, y, usage = normal(2, tokens, k), normal(3, tokens, k) / np.float32(100), np.ones(11, np.float32)
        h = ffn(x, weights)
        expected = y + h @ weights[2]
        cpu.glu(x, FfnWeights(held, codecs, "silu", True), y, usage=usage)
        assert rms_ratio(y, expected) < 3e-4
        assert rms_ratio(usage - 1, np.abs(h).sum(0).reshape(11, -1).sum(1)) < 3e-4


@pytest.mark.parametrize("call", [cpu.glu, cpu.gemm_glu])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("group", "down"), [(64, Codec.Q5_0), (192, Codec.Q8_0), (256, Codec.Q6_K), (512, Codec.Q4_K)])
def test_groups_by_the_reference(isa, call, gated, group, down):
    """Mixed codecs, tokens that are chosen and have factors, a bias, and what bundles were used."""
    k, tokens = 512, 9
    codecs = NeuronCodecs(Codec.Q6_K if gated else None, Codec.Q8_0, down, group)
    held, weights = grouped(1, 5, k, codecs)
    bias, gate_bias = normal(4, 5 * group), normal(6, 5 * group) if gated else None
    x, y, usage = normal(2, tokens, k), normal(3, tokens, k), np.ones(5, np.float32)
    routed = RoutedTokens(np.array([7, 0, 3], np.int32), np.array([0.5, -2.0, 0.125], np.float32))
    expected, counted = torch.from_numpy(y.copy()), torch.ones(5)
    beside = torch.from_numpy(bias), None if gate_bias is None else torch.from_numpy(gate_bias)
    given = FfnWeights(torch.from_numpy(held), codecs, "silu", gated, *beside)
    chosen = RoutedTokens(torch.from_numpy(routed.tokens), torch.from_numpy(routed.factors))
    reference.glu(torch.from_numpy(x), given, expected, chosen, usage=counted)
    call(x, FfnWeights(held, codecs, "silu", gated, bias, gate_bias), y, routed, usage=usage)
    tolerance = 1e-2 if isa in HALF_GEMM and call is cpu.gemm_glu else 3e-4
    assert rms_ratio(y, expected.numpy()) < tolerance
    assert rms_ratio(usage, counted.numpy()) < tolerance
    h = ffn(x, weights, bias, gate_bias)
    assert rms_ratio(expected.numpy()[7] - normal(3, tokens, k)[7], 0.5 * (h @ weights[-1])[7]) < 1e-4


@pytest.mark.parametrize(("group", "down"), [(128, Codec.Q4_0), (256, Codec.Q4_K)])
def test_groups_are_invariant(isa, group, down):
    """Batch, threads, slots and the split of groups over calls leave every bit as it is, in narrow and wide passes."""
    k, count, codecs = 256, 21, NeuronCodecs(Codec.Q4_K, Codec.Q5_K, down, group)
    held, _ = grouped(1, count, k, codecs)
    x, start = normal(2, 16, k), normal(3, 16, k)
    whole, wide = start.copy(), start.copy()
    cpu.glu(x, FfnWeights(held, codecs, "silu", True), whole)
    cpu.gemm_glu(x, FfnWeights(held, codecs, "silu", True), wide)
    order = np.random.default_rng(5).permutation(count).astype(np.int32)
    places = np.argsort(order).astype(np.int32)
    before = cpu.threads()
    try:
        for tokens, threads in ((1, 3), (2, 1), (7, 2), (16, 5)):
            cpu.set_threads(threads)
            for call, expected in ((cpu.glu, whole), (cpu.gemm_glu, wide)):
                y = start[-tokens:].copy()
                for first, last in ((0, 1), (1, 13), (13, count)):
                    call(x[-tokens:].copy(), FfnWeights(held[first:last], codecs, "silu", True), y)
                assert same(y, expected[-tokens:])
            y = start[-tokens:].copy()
            slots = np.where(places < 9, places, 8 - places).astype(np.int32)
            parts = [held[order[9:15]], held[order[15:]]]
            own = FfnWeights(held[order[:9]], codecs, "silu", True)
            cpu.glu(x[-tokens:].copy(), own, y, slots=slots, streamed_bundles=parts)
            assert same(y, whole[-tokens:])
    finally:
        cpu.set_threads(before)


def test_single_neurons_with_down_requantized(isa):
    """Gate and up as a file has them, down as a row of int8."""
    k, n, codecs = 512, 45, NeuronCodecs(Codec.Q4_K, Codec.Q6_K, Codec.INT8)
    gate, up, down = kept_rows(1, n, k, Codec.Q4_K), kept_rows(2, n, k, Codec.Q6_K), normal(4, n, k) / np.float32(30)
    coded = np.empty((n, row_bytes(Codec.INT8, k)), np.uint8)
    cpu.quantize(down, Codec.INT8, coded)
    held = np.concatenate((gate, up, coded), 1)
    wide = 1e-2 if isa in HALF_GEMM else 3e-6
    for tokens, call, close in ((1, cpu.glu, 3e-4), (16, cpu.glu, 3e-4), (19, cpu.gemm_glu, wide)):
        x, y = normal(5, tokens, k), normal(6, tokens, k)
        expected = torch.from_numpy(y.copy())
        reference.glu(torch.from_numpy(x), FfnWeights(torch.from_numpy(held), codecs, "silu", True), expected)
        call(x, FfnWeights(held, codecs, "silu", True), y)
        assert rms_ratio(y, expected.numpy()) < close


def test_what_does_not_fit_is_refused():
    held, x, y = np.zeros((2, 1 << 18), np.uint8), normal(1, 1, 256), normal(2, 1, 256)

    def refuse(codecs: NeuronCodecs, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            cpu.glu(x, FfnWeights(held, codecs, "silu", True), y)

    refuse(NeuronCodecs(Codec.Q4_K, Codec.Q4_K, Codec.Q4_K, 1), "down of a kept codec needs a group")
    refuse(NeuronCodecs(Codec.Q4_K, Codec.INT8, Codec.INT8, 1), "both be kept, or neither")
    refuse(NeuronCodecs(Codec.Q4_K, Codec.Q4_K, Codec.INT8, 64), "must be of kept codecs")
    refuse(NeuronCodecs(Codec.Q4_K, Codec.Q4_K, Codec.Q4_0, 96), "groups of 64 to 2048 neurons, in steps of 64")
    refuse(NeuronCodecs(Codec.Q4_K, Codec.Q4_K, Codec.Q4_K, 128), "128 are not whole blocks of 256")
    with pytest.raises(ValueError, match="rows of 96 are not whole blocks of 256"):
        cpu.linear(normal(1, 1, 96), held, Codec.Q4_K, y, 0, 8)
    with pytest.raises(ValueError, match="not quantized to a kept codec"):
        cpu.quantize(normal(1, 2, 256), Codec.Q4_K, np.zeros((2, 144), np.uint8))
    with pytest.raises(ValueError, match="bundles: .* found 100"):
        cpu.glu(x, FfnWeights(held[:, :100], NeuronCodecs(Codec.Q4_K, Codec.Q4_K, Codec.Q4_K, 256), "silu", True), y)
