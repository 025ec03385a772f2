from __future__ import annotations

import pytest
import torch

from flashrt_kernels import reference
from flashrt_kernels.ffn import FfnWeights
from flashrt_kernels.rows import Codec

from .helpers import AskNothing, gpu, listed, neurons, normal, pinned, rms_ratio, same

K = 72
NEURONS = 300


def whole(x, weights, y, scores, threshold):
    """Token by token, with all rows on the device and counts that the host knows; the rows of each."""
    result, chosen = y.clone(), []
    for token in range(len(x)):
        own = slice(token, token + 1)
        chosen.append((~(scores[token] <= threshold)).nonzero()[:, 0].to(torch.int32))
        gpu.glu_rows(x[own], weights, result[own], chosen[-1])
    return result, chosen


@pytest.mark.parametrize(("slots", "thresholds"), [(128, (0.9, 0.0, 100.0)), (200, (1.0, -0.5)), (300, (0.9, -100.0))])
def test_slots_change_no_bit(device, slots, thresholds):
    """Few rows, more than there are slots, none, all: the sum is that over a token's rows in one place."""
    codec, w = Codec.INT8, neurons(1, NEURONS, K, Codec.INT8)
    step = gpu.SparseStep(NEURONS, slots, K, codec, "silu", True, device)
    layer = gpu.LayerRows.create(pinned(w, device), slots, device)
    weights = FfnWeights(w.to(device), codec, "silu", True)
    for i, threshold in enumerate(thresholds):
        tokens = (1, 3, 2)[i]
        x, y = normal(10 * i + 2, tokens, K).to(device), normal(10 * i + 3, tokens, K).to(device)
        scores = (normal(10 * i + 4, tokens, NEURONS) / 3).to(device)
        expected, chosen = whole(x, weights, y, scores, threshold)
        judged = y.clone()
        for token, rows in enumerate(chosen):
            reference.glu(x[token : token + 1], weights, judged[token : token + 1], slots=rows)
        with AskNothing():
            step(layer, x, scores, threshold, y)
        assert same(y, expected)
        assert rms_ratio(y, judged) < 3e-6


@pytest.mark.parametrize("activation", ["relu", "fatrelu:1.5"])
def test_a_token_does_not_see_who_shares_its_pass(device, activation):
    """Rows that only another token needs are none of its own, whether there is room for all or not."""
    codec, w = Codec.INT4, neurons(1, NEURONS, K, Codec.INT4, gated=False)
    x, start = normal(2, 3, K).to(device), normal(3, 3, K).to(device)
    scores, up_bias = normal(4, 3, NEURONS).to(device), normal(5, NEURONS).to(device)
    for slots in (128, NEURONS):
        step = gpu.SparseStep(NEURONS, slots, K, codec, activation, False, device)
        layer, together = gpu.LayerRows.create(pinned(w, device), slots, device, up_bias), start.clone()
        step(layer, x, scores, 0.4, together)
        for token in range(3):
            own = slice(token, token + 1)
            alone = start[own].clone()
            step(layer, x[own], scores[own], 0.4, alone)
            assert same(alone, together[own])
            rows = (scores[token] > 0.4).nonzero()[:, 0]
            expected, weights = start[own].clone(), FfnWeights(w.to(device), codec, activation, False, up_bias[rows])
            reference.glu(x[own], weights, expected, slots=rows)
            assert rms_ratio(alone - start[own], expected - start[own]) < 3e-6


def test_layers_share_a_step(device):
    """Rows that a token shares with the last stay, and each layer has its own, with its bias."""
    codec, threshold = Codec.INT4, 0.6
    step = gpu.SparseStep(NEURONS, 256, K, codec, "relu", False, device)
    weights = [neurons(seed, NEURONS, K, codec, gated=False) for seed in (1, 2)]
    biases = [normal(seed, NEURONS).to(device) for seed in (3, 4)]
    layers = [
        gpu.LayerRows.create(pinned(w, device), 256, device, up_bias)
        for w, up_bias in zip(weights, biases, strict=True)
    ]
    scores = normal(5, 1, NEURONS).to(device)
    for token in range(3):
        scores = scores.roll(7)
        for layer, w, up_bias in zip(layers, weights, biases, strict=True):
            x, y = normal(20 + token, 1, K).to(device), normal(30 + token, 1, K).to(device)
            weights_of = FfnWeights(w.to(device), codec, "relu", False, up_bias)
            expected, [rows] = whole(x, weights_of, y, scores, threshold)
            step(layer, x, scores, threshold, y)
            assert same(y, expected)
            slots = layer.slot_map.slot_of[rows.long()]
            assert torch.equal(layer.slots[slots.long()].cpu(), w[rows.cpu().long()])


def test_it_fetches_only_what_is_missing(device, monkeypatch):
    fetched = []

    def count(rows, indices, out, slots, count):
        fetched.append(int(count))
        gpu.gather_rows(rows, indices, out, slots, count)

    monkeypatch.setattr("flashrt_kernels.gpu.step.gather_rows", count)
    step = gpu.SparseStep(NEURONS, 256, K, Codec.INT8, "silu", True, device)
    layer = gpu.LayerRows.create(pinned(neurons(1, NEURONS, K, Codec.INT8), device), 256, device)
    x, scores = normal(2, 1, K).to(device), normal(3, 1, NEURONS).to(device)
    chosen = set(listed(gpu.select_rows(scores[0], 0.8)))
    later = scores.roll(1)
    missing = set(listed(gpu.select_rows(later[0], 0.8))) - chosen
    for asked in (scores, scores, later):
        step(layer, x, asked, 0.8, torch.zeros_like(x))
    assert fetched[::2] == [len(chosen), 0, len(missing)]
    assert fetched[1::2] == [0, 0, 0]


def test_wrong_arguments_are_named(device):
    for slots in (127, NEURONS + 1):
        with pytest.raises(ValueError, match=rf"^slots: expected 128 to {NEURONS}, found {slots}"):
            gpu.SparseStep(NEURONS, slots, K, Codec.INT8, "silu", True, device)
    with pytest.raises(ValueError, match="^up_bias"):
        gpu.LayerRows.create(pinned(neurons(1, 3, K, Codec.INT8), device), 2, device, normal(1, 2).to(device))
    step = gpu.SparseStep(NEURONS, 128, K, Codec.INT8, "silu", True, device)
    rows = pinned(neurons(1, NEURONS, K, Codec.INT8), device)
    x, scores = normal(2, 2, K).to(device), normal(3, 2, NEURONS).to(device)
    layer = gpu.LayerRows.create(rows, 128, device)
    for name, args in [
        ("layer", (gpu.LayerRows.create(rows, 129, device), x, scores)),
        ("layer", (gpu.LayerRows.create(rows[:-1], 128, device), x, scores)),
        ("scores", (layer, x, scores[:1])),
        ("x", (layer, normal(2, 17, K).to(device), normal(3, 17, NEURONS).to(device))),
        ("x", (layer, normal(2, 2, 4 * K).to(device), scores)),
    ]:
        with pytest.raises(ValueError, match=f"^{name}"):
            step(*args, 0.0, torch.zeros_like(args[1]))
    with pytest.raises(ValueError, match="^y"):
        step(layer, x, scores, 0.0, torch.zeros_like(x[:1]))
    with pytest.raises(ValueError, match="^activation"):
        gpu.SparseStep(NEURONS, 128, K, Codec.INT8, "tanh", True, device)


@pytest.mark.gpu
def test_real_sizes(cuda):
    """In a CUDA graph, which nothing that waits for the device can be captured into."""
    k, n, codec = 1536, 8960, Codec.INT4
    w = neurons(1, n, k, codec, device=cuda).cpu()
    step, layer = (
        gpu.SparseStep(n, 4096, k, codec, "silu", True, cuda),
        gpu.LayerRows.create(w.pin_memory(), 4096, cuda),
    )
    x, scores, y = normal(2, 4, k).to(cuda), normal(3, 4, n).to(cuda), torch.zeros(4, k, device=cuda)
    step(layer, x, scores, 1.5, y)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(layer, x, scores, 1.5, y)
    for seed in range(5):
        scores.copy_(normal(seed, 4, n))
        x.copy_(normal(seed + 10, 4, k))
        y.copy_(normal(seed + 20, 4, k))
        expected, chosen = whole(x, FfnWeights(w.to(cuda), codec, "silu", True), y, scores, 1.5)
        graph.replay()
        assert all(0 < len(rows) < n for rows in chosen)
        assert same(y, expected)
