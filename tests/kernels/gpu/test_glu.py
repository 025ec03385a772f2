from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flashrt_kernels import reference
from flashrt_kernels.ffn import FfnWeights, RoutedTokens
from flashrt_kernels.rows import DTYPES, Codec

from .helpers import gpu, int32, neurons, normal, rms_ratio, same, shuffled

# numpy's word for what a GPU does without one: exp(-x) is infinite, and silu(x) zero.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")
ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu", "relu2")


def expect(x, weights, y, slots, factors=None):
    result, bias = y.clone(), weights.up_bias
    if bias is not None:  # the reference takes that of the bundles that take part, in their order
        weights = replace(weights, up_bias=bias[slots.long()])
    tokens = torch.arange(len(x), dtype=torch.int32, device=x.device)
    reference.glu(x, weights, result, None if factors is None else RoutedTokens(tokens, factors), slots=slots)
    return result


@pytest.mark.parametrize("codec", DTYPES)
@pytest.mark.parametrize(("k", "n", "tokens"), [(48, 1, 3), (63, 7, 1), (224, 129, 2), (640, 33, 1)])
def test_it_matches_the_reference(device, codec, k, n, tokens):
    w, x = neurons(1, n + 5, k, codec).to(device), normal(2, tokens, k).to(device)
    y, slots = normal(3, tokens, k).to(device) * 0.01, shuffled(4, n + 5, n).to(device)
    expected = expect(x, FfnWeights(w, codec, "silu", True), y, slots)
    gpu.glu_rows(x, FfnWeights(w, codec, "silu", True), y, slots)
    assert rms_ratio(y, expected) < 3e-6


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(device, activation, gated):
    k, n, tokens, codec = 96, 37, 2, Codec.BF16
    w, x, y = (t.to(device) for t in (neurons(1, n, k, codec, gated), normal(2, tokens, k), normal(3, tokens, k)))
    weights = FfnWeights(w, codec, activation, gated, None if gated else normal(5, n).to(device))
    factors, slots = torch.tensor([0.5, -2.0], device=device), shuffled(4, n, 33).to(device)
    before = y.clone()
    expected = expect(x, weights, y, slots, factors)
    gpu.glu_rows(x, weights, y, slots, factors=factors)
    assert rms_ratio(y - before, expected - before) < 3e-6


@pytest.mark.parametrize("gated", [True, False])
def test_relu_with_a_threshold(device, gated):
    """What is at most the threshold is zero, and that is not relu: thresholds among the values that there are."""
    k, n, codec = 96, 37, Codec.BF16
    w, x, y = (t.to(device) for t in (neurons(1, n, k, codec, gated), normal(2, 2, k), normal(3, 2, k)))
    weights, slots = FfnWeights(w, codec, "fatrelu:2.5", gated), shuffled(4, n, 33).to(device)
    before, plain = y.clone(), y.clone()
    expected = expect(x, weights, y, slots)
    gpu.glu_rows(x, weights, y, slots)
    gpu.glu_rows(x, replace(weights, activation="relu"), plain, slots)
    assert rms_ratio(y - before, expected - before) < 3e-6
    assert rms_ratio(plain - before, expected - before) > 1e-2


@pytest.mark.parametrize("codec", [Codec.INT8, Codec.INT4])
def test_neither_the_batch_nor_the_calls_change_a_bit(device, codec):
    k, n, tokens = 72, 300, 3
    w, x, start = neurons(1, n, k, codec).to(device), normal(2, tokens, k).to(device), normal(3, tokens, k).to(device)
    slots = shuffled(4, n, 270).to(device)
    whole = start.clone()
    gpu.glu_rows(x, FfnWeights(w, codec, "silu", True), whole, slots)
    for chosen in ([0], [2, 1]):
        y = start[chosen]
        gpu.glu_rows(x[chosen], FfnWeights(w, codec, "silu", True), y, slots)
        assert same(y, whole[chosen])
    y = start.clone()
    for first, last in ((0, 128), (128, 256), (256, 270)):
        gpu.glu_rows(x, FfnWeights(w, codec, "silu", True), y, slots[first:last].contiguous())
    assert same(y, whole)


def test_only_counted_slots_are_read(device):
    """The count lies on the device; what stands beyond it would lead astray."""
    k, n, codec = 80, 70, Codec.INT4
    w, x, start = neurons(1, n, k, codec).to(device), normal(2, 2, k).to(device), normal(3, 2, k).to(device)
    slots = shuffled(4, n, 60).to(device)
    for count in (0, 1, 32, 33, 60):
        expected, y = start.clone(), start.clone()
        gpu.glu_rows(x, FfnWeights(w, codec, "silu", True), expected, slots[:count])
        astray = torch.full((130,), 1 << 30, dtype=torch.int32, device=device)
        astray[:count] = slots[:count]
        scratch = gpu.workspace(130, 2, k, device).fill_(torch.nan)
        gpu.glu_rows(x, FfnWeights(w, codec, "silu", True), y, astray, int32(count).to(device), scratch=scratch)
        assert same(y, expected)


def test_infinity_and_nan_stay(device):
    """A broken activation must show, whatever its row's neighbours are."""
    k, n, codec = 64, 3, Codec.F32
    w, slots = neurons(1, n, k, codec).to(device), int32(0, 1, 2).to(device)
    for activation in ACTIVATIONS:
        x = normal(2, 2, k).to(device)
        x[1, 5] = torch.nan
        y = torch.zeros_like(x)
        gpu.glu_rows(x, FfnWeights(w, codec, activation, True), y, slots)
        assert y[0].isfinite().all()
        assert y[1].isnan().all()


def test_wrong_arguments_are_named(device):
    codec = Codec.INT8
    w, x, y = neurons(1, 4, 64, codec).to(device), normal(1, 3, 64).to(device), normal(2, 3, 64).to(device)
    slots = int32(0, 3).to(device)
    good = FfnWeights(w, codec, "silu", True)
    for name, given in [
        ("x", {"x": x[0]}),
        ("x", {"x": normal(1, 17, 64).to(device)}),
        ("bundles", {"weights": replace(good, bundles=w[:, :128])}),
        ("bundles", {"weights": replace(good, bundles=w.to(torch.int8))}),
        ("activation", {"weights": replace(good, activation="tanh")}),
        ("activation", {"weights": replace(good, activation="fatrelu:none")}),
        ("y", {"y": y[:2]}),
        ("y", {"y": y.T.contiguous().T}),
        ("slots", {"slots": slots.long()}),
        ("count", {"count": slots}),
        ("up_bias", {"weights": replace(good, up_bias=normal(1, 4).to(device))}),
        ("factors", {"factors": normal(1, 2).to(device)}),
        ("scratch", {"scratch": gpu.workspace(2, 2, 64, device)}),
    ]:
        with pytest.raises(ValueError, match=f"^{name}"):
            gpu.glu_rows(**{"x": x, "weights": good, "y": y, "slots": slots} | given)


@pytest.mark.gpu
@pytest.mark.parametrize("codec", DTYPES)
@pytest.mark.parametrize("tokens", [1, 5, 16])
def test_real_sizes(cuda, codec, tokens):
    k, n = 1536, 8960
    w, x, start = neurons(1, n, k, codec, device=cuda), normal(2, tokens, k).to(cuda), normal(3, tokens, k).to(cuda)
    for count in (n // 10, n):
        slots = shuffled(4, n, count).to(cuda)
        y = start.clone()
        expected = expect(x, FfnWeights(w, codec, "silu", True), y, slots)
        gpu.glu_rows(x, FfnWeights(w, codec, "silu", True), y, slots)
        assert rms_ratio(y, expected) < 1e-5
        alone = start[-1:].clone()
        gpu.glu_rows(x[-1:].contiguous(), FfnWeights(w, codec, "silu", True), alone, slots)
        assert same(alone, y[-1:])
