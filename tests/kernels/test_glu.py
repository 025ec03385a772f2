import itertools
from dataclasses import fields, is_dataclass, replace

import numpy as np
import pytest
import torch

from flashrt_kernels.ffn import FfnWeights, RoutedTokens
from flashrt_kernels.rows import Codec

from .helpers import (
    CODECS,
    HALF_GEMM,
    as_met,
    cpu,
    empty,
    neurons,
    normal,
    reference,
    rms_ratio,
    same,
    tensor,
    tolerance,
)

ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu", "relu2")


def expect(x, weights, y, **options):
    result = torch.from_numpy(y.copy())
    reference.glu(tensor(x), on_torch(weights), result, **{name: on_torch(v) for name, v in options.items()})
    return result.numpy()


def on_torch(given):
    """An array, or a dataclass that holds some, as tensors."""
    if not is_dataclass(given):
        return tensor(given)
    held = {field.name: getattr(given, field.name) for field in fields(given)}
    return replace(given, **{name: tensor(value) for name, value in held.items() if isinstance(value, np.ndarray)})


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("k", "n"), [(48, 3), (63, 21), (160, 33), (224, 70), (640, 45), (1536, 130)])
def test_glu_matches_reference(isa, codec, k, n):
    w = neurons(1, n, k, codec)
    for tokens in (1, 2, 3, 5, 8, 16):
        x, y = normal(2, tokens, k), normal(3, tokens, k) * np.float32(0.01)
        expected = expect(as_met(x, codec), FfnWeights(w, codec, "silu", True), y)
        cpu.glu(x, FfnWeights(w, codec, "silu", True), y)
        assert rms_ratio(y, expected) < tolerance(codec)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("call", [cpu.glu, cpu.gemm_glu])
def test_activations(isa, call, activation, gated):
    k, n, tokens, codec = 96, 37, 19, Codec.F32
    w, x, y = neurons(1, n, k, codec, gated), normal(2, tokens, k), normal(3, tokens, k)
    for biases in ((None, None), (normal(4, n), normal(5, n) if gated else None)):
        own = y.copy()
        expected = expect(x, FfnWeights(w, codec, activation, gated, *biases), own)
        call(x, FfnWeights(w, codec, activation, gated, *biases), own)
        assert rms_ratio(own, expected) < 2e-6


@pytest.mark.parametrize("call", [cpu.glu, cpu.gemm_glu])
def test_clamped_swiglu(isa, call):
    """With a limit that many gates and ups are beyond, some of them not finite."""
    k, n, tokens, codec, name = 96, 37, 19, Codec.F32, "clamped_swiglu:1.702:0.7"
    w, x, y = neurons(1, n, k, codec), normal(2, tokens, k), normal(3, tokens, k)
    biases = normal(4, n), normal(5, n)
    weights = FfnWeights(w, codec, name, True, *biases)
    expected = expect(x, weights, y)
    call(x, weights, y)
    assert rms_ratio(y, expected) < 2e-6
    x[3, 5] = np.nan
    call(x, weights, y)
    assert np.isnan(y[3]).all()
    assert np.isfinite(np.delete(y, 3, 0)).all()
    with pytest.raises(ValueError, match="^activation"):
        call(x, FfnWeights(neurons(1, n, k, codec, False), codec, name, False), y)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("call", [cpu.glu, cpu.gemm_glu])
def test_relu_with_a_threshold(isa, call, gated):
    k, n, tokens, codec = 96, 37, 19, Codec.F32
    w, x, y = neurons(1, n, k, codec, gated), normal(2, tokens, k), normal(3, tokens, k)
    plain, expected = y.copy(), expect(x, FfnWeights(w, codec, "fatrelu:7.0", gated), y)
    call(x, FfnWeights(w, codec, "relu", gated), plain)
    call(x, FfnWeights(w, codec, "fatrelu:7.0", gated), y)
    assert rms_ratio(y, expected) < 2e-6
    assert rms_ratio(plain, expected) > 1e-2


@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_relu_does_not_hide_what_is_no_number(isa, activation):
    w, x, y = neurons(1, 21, 48, Codec.F32), normal(2, 1, 48), normal(3, 1, 48)
    x[0, 5] = np.nan
    cpu.glu(x, FfnWeights(w, Codec.F32, activation, True), y)
    assert np.isnan(y).all()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("k", "n"), [(48, 3), (63, 21), (640, 75), (1536, 70)])
@pytest.mark.parametrize("tokens", [17, 63, 123])
def test_gemm_glu_matches_reference(isa, codec, k, n, tokens):
    w, x, y = neurons(1, n, k, codec), normal(2, tokens, k), normal(3, tokens, k) * np.float32(0.01)
    expected = expect(x, FfnWeights(w, codec, "silu", True), y)
    cpu.gemm_glu(x, FfnWeights(w, codec, "silu", True), y)
    exact = codec is Codec.F32 or isa not in HALF_GEMM
    assert rms_ratio(y, expected) < (3e-6 if exact else 1e-2)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("call", [cpu.glu, cpu.gemm_glu])
def test_chosen_tokens_with_weights(isa, call, codec):
    k, n, tokens = 160, 29, 9
    w, x, y = neurons(1, n, k, codec), normal(2, tokens, k), normal(3, tokens, k)
    before = y.copy()
    chosen = np.array([7, 0, 3], np.int32)
    routed = RoutedTokens(chosen, np.array([0.5, -2.0, 0.125], np.float32))
    met = as_met(x, codec) if call is cpu.glu else x
    expected = expect(met, FfnWeights(w, codec, "silu", True), y, routed=routed)
    call(x, FfnWeights(w, codec, "silu", True), y, routed=routed)
    assert rms_ratio(y, expected) < 1e-2
    others = [i for i in range(tokens) if i not in chosen]
    assert same(y[others], before[others])


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("gated", [True, False])
def test_glu_is_invariant(isa, codec, gated):
    """Batch, threads and the split of neurons over calls, at multiples of 128, leave every bit as it is."""
    k, n, tokens = 352, 601, 16
    w, x = neurons(1, n, k, codec, gated), normal(2, tokens, k)
    whole = normal(3, tokens, k)
    start = whole.copy()
    cpu.glu(x, FfnWeights(w, codec, "silu", gated), whole)
    for batch in (1, 2, 3, 5, 8):
        y = start[-batch:].copy()
        cpu.glu(x[-batch:].copy(), FfnWeights(w, codec, "silu", gated), y)
        assert same(y, whole[-batch:])
    chosen = np.array([9, 2, 4], np.int32)
    y = start.copy()
    cpu.glu(x, FfnWeights(w, codec, "silu", gated), y, RoutedTokens(chosen, np.ones(3, np.float32)))
    assert same(y[chosen], whole[chosen])
    y = start.copy()
    for threads, first, last in ((1, 0, 128), (3, 128, 256), (2, 256, 512), (1, 512, n)):
        cpu.set_threads(threads)
        cpu.glu(x, FfnWeights(w[first:last], codec, "silu", gated), y)
    assert same(y, whole)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("gated", [True, False])
def test_slots_are_bundles_gathered(isa, codec, gated):
    """Rows that lie anywhere give the bits of the same rows lying side by side, and what the reference gives."""
    k, n = 352, 301
    w = neurons(1, n, k, codec, gated)
    slots = np.random.default_rng(5).permutation(n)[:170].astype(np.int32)
    up_bias = None if gated else normal(4, len(slots))
    weights = FfnWeights(w, codec, "relu2", gated, up_bias)
    for tokens in (1, 5):
        x, y = normal(2, tokens, k), normal(3, tokens, k)
        gathered, expected = y.copy(), expect(as_met(x, codec), weights, y, slots=slots)
        cpu.glu(x, replace(weights, bundles=w[slots].copy()), gathered)
        cpu.glu(x, weights, y, slots=slots)
        assert same(y, gathered)
        assert rms_ratio(y, expected) < tolerance(codec)
    before = y.copy()
    cpu.glu(x, FfnWeights(w, codec, "relu2", gated), y, slots=slots[:0])
    assert same(y, before)


@pytest.mark.parametrize("codec", CODECS)
def test_gemm_glu_is_invariant(isa, codec):
    k, n, tokens = 352, 217, 63
    w, x = neurons(1, n, k, codec), normal(2, tokens, k)
    whole = normal(3, tokens, k)
    start = whole.copy()
    cpu.gemm_glu(x, FfnWeights(w, codec, "silu", True), whole)
    for first, last in ((0, 17), (17, 18), (18, 63)):
        y = start[first:last].copy()
        cpu.gemm_glu(x[first:last].copy(), FfnWeights(w, codec, "silu", True), y)
        assert same(y, whole[first:last])
    y = start.copy()
    for threads, first, last in ((1, 0, 64), (3, 64, 192), (2, 192, n)):
        cpu.set_threads(threads)
        cpu.gemm_glu(x, FfnWeights(w[first:last], codec, "silu", True), y)
    assert same(y, whole)


def test_wrong_arguments_are_named():
    codec = Codec.INT8
    w, x, y = neurons(1, 4, 64, codec), normal(1, 3, 64), empty(3, 64)
    good = FfnWeights(w, codec, "silu", True)
    one = normal(1, 1)
    for name, given in [
        ("x", {"x": x[0]}),
        ("bundles", {"weights": replace(good, bundles=w[:, :128])}),
        ("codec", {"weights": replace(good, codec="int8")}),
        ("activation", {"weights": replace(good, activation="tanh")}),
        ("activation", {"weights": replace(good, activation="fatrelu:none")}),
        ("y", {"y": empty(2, 64)}),
        ("y", {"y": x}),
        ("up_bias", {"weights": replace(good, up_bias=normal(1, 3))}),
        ("gate_bias", {"weights": replace(good, gate_bias=normal(1, 3))}),
        ("tokens", {"routed": RoutedTokens(np.array([3], np.int32), one)}),
        ("tokens", {"routed": RoutedTokens(np.array([1, 1], np.int32), one)}),
        ("tokens", {"routed": RoutedTokens(np.array([1], np.int64), one)}),
        ("factors", {"routed": RoutedTokens(np.array([1, 2], np.int32), one)}),
    ]:
        for call in (cpu.glu, cpu.gemm_glu):
            with pytest.raises(ValueError, match=f"^{name}"):
                call(**{"x": x, "weights": good, "y": y} | given)
    for slots in (np.array([4], np.int32), np.array([-1], np.int32), np.array([0], np.int64)):
        with pytest.raises(ValueError, match="^slots"):
            cpu.glu(x, good, y, slots=slots)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("gated", [True, False])
def test_bundles_beside_are_numbered_on(isa, codec, gated):
    """Rows of several arrays give the bits of the same rows side by side, whichever array each is in."""
    k, n = 96, 290
    w = neurons(1, n, k, codec, gated)
    split = (0, 90, 170, 250, 290)  # the first is `bundles`; the others are beside, the last with fewer
    parts = [w[begin:end].copy() for begin, end in itertools.pairwise(split)]
    rows = np.random.default_rng(6).permutation(n)[:200].astype(np.int32)
    slots = np.where(rows < 90, rows, -1 - (rows - 90)).astype(np.int32)
    x, y = normal(2, 5, k), normal(3, 5, k)
    up_bias = None if gated else normal(4, 200)
    expected = y.copy()
    cpu.glu(x, FfnWeights(w[rows].copy(), codec, "silu", gated, up_bias), expected)
    cpu.glu(x, FfnWeights(parts[0], codec, "silu", gated, up_bias), y, slots=slots, streamed_bundles=parts[1:])
    assert same(y, expected)
    for wrong in ([parts[1][:5], parts[2]], [parts[1][:, :8]], []):
        with pytest.raises(ValueError, match=r"^(streamed_bundles|slots)"):
            cpu.glu(x, FfnWeights(parts[0], codec, "silu", gated, up_bias), y, slots=slots, streamed_bundles=wrong)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("call", [cpu.glu, cpu.gemm_glu])
def test_usage_sums_activations(isa, call, codec, gated):
    """What is said of every neuron is the sum of |h| over the tokens, added to what was there."""
    k, n, tokens = 96, 200, 18
    w, x, y = neurons(1, n, k, codec, gated), normal(2, tokens, k), normal(3, tokens, k)
    usage, plain = abs(normal(5, n)), y.copy()
    expected = tensor(usage.copy())
    met = as_met(x, codec) if call is cpu.glu else x
    expect(met, FfnWeights(w, codec, "silu", gated), y, usage=expected.numpy())
    call(x, FfnWeights(w, codec, "silu", gated), plain)
    call(x, FfnWeights(w, codec, "silu", gated), y, usage=usage)
    assert same(y, plain)
    assert rms_ratio(usage, expected.numpy()) < max(tolerance(codec), 5e-3)  # a wide pass may round to bfloat16
    with pytest.raises(ValueError, match="^usage"):
        call(x, FfnWeights(w, codec, "silu", gated), y, usage=usage[:-1].copy())
