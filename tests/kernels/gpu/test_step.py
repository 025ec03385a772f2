from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flashrt_kernels import reference
from flashrt_kernels.ffn import FfnWeights
from flashrt_kernels.rows import Codec

from .helpers import gpu, listed, neurons, normal, rms_ratio, same

K = 72
NEURONS = 300


class AskNothing(TorchDispatchMode):
    """Fails when a tensor's value is asked for, which on a GPU would wait for it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


def host(rows: torch.Tensor, device: str) -> torch.Tensor:
    return rows.pin_memory() if device == "cuda" else rows


def whole(x, w, codec, activation, gated, y, scores, threshold, up_bias=None):
    """The same with all rows on the device and a count that the host knows."""
    chosen = gpu.select_rows(scores, threshold)
    result = y.clone()
    rows = chosen.items[: int(chosen.count)]
    gpu.glu_rows(x, w, codec, activation, gated, result, rows, up_bias=up_bias)
    return result, rows


@pytest.mark.parametrize(("slots", "thresholds"), [(128, (0.9, 0.0, 100.0)), (200, (1.0, -0.5)), (300, (0.9, -100.0))])
def test_slots_change_no_bit(device, slots, thresholds):
    """Few rows, more than there are slots, none, all: the sum is that over all rows in one place."""
    codec, w = Codec.INT8, neurons(1, NEURONS, K, Codec.INT8)
    step = gpu.SparseStep(NEURONS, slots, 3, K, codec, "silu", True, device)
    layer = gpu.LayerRows.create(host(w, device), slots, device)
    for i, threshold in enumerate(thresholds):
        tokens = (1, 3, 2)[i]
        x, y = normal(10 * i + 2, tokens, K).to(device), normal(10 * i + 3, tokens, K).to(device)
        scores = (normal(10 * i + 4, tokens, NEURONS) / 3).to(device)
        expected, rows = whole(x, w.to(device), codec, "silu", True, y, scores, threshold)
        judged = y.clone()
        if len(rows):
            reference.glu(x, FfnWeights(w.to(device), codec, "silu", True), judged, slots=rows)
        with AskNothing():
            step(layer, x, scores, threshold, y)
        assert same(y, expected)
        assert rms_ratio(y, judged) < 3e-6


def test_layers_share_a_step(device):
    """Rows that a token shares with the last stay, and each layer has its own, with its bias."""
    codec, threshold = Codec.INT4, 0.6
    step = gpu.SparseStep(NEURONS, 256, 1, K, codec, "relu", False, device)
    weights = [neurons(seed, NEURONS, K, codec, gated=False) for seed in (1, 2)]
    biases = [normal(seed, NEURONS).to(device) for seed in (3, 4)]
    layers = [
        gpu.LayerRows.create(host(w, device), 256, device, up_bias) for w, up_bias in zip(weights, biases, strict=True)
    ]
    scores = normal(5, 1, NEURONS).to(device)
    for token in range(3):
        scores = scores.roll(7)
        for layer, w, up_bias in zip(layers, weights, biases, strict=True):
            x, y = normal(20 + token, 1, K).to(device), normal(30 + token, 1, K).to(device)
            expected, rows = whole(x, w.to(device), codec, "relu", False, y, scores, threshold, up_bias)
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
    step = gpu.SparseStep(NEURONS, 256, 1, K, Codec.INT8, "silu", True, device)
    layer = gpu.LayerRows.create(host(neurons(1, NEURONS, K, Codec.INT8), device), 256, device)
    x, scores = normal(2, 1, K).to(device), normal(3, 1, NEURONS).to(device)
    chosen = set(listed(gpu.select_rows(scores, 0.8)))
    later = scores.roll(1)
    missing = set(listed(gpu.select_rows(later, 0.8))) - chosen
    for asked in (scores, scores, later):
        step(layer, x, asked, 0.8, torch.zeros_like(x))
    assert fetched[::2] == [len(chosen), 0, len(missing)]
    assert fetched[1::2] == [0, 0, 0]


def test_wrong_arguments_are_named(device):
    for slots in (127, NEURONS + 1):
        with pytest.raises(ValueError, match=rf"^slots: expected 128 to {NEURONS}, found {slots}"):
            gpu.SparseStep(NEURONS, slots, 1, K, Codec.INT8, "silu", True, device)
    with pytest.raises(ValueError, match="^up_bias"):
        gpu.LayerRows.create(host(neurons(1, 3, K, Codec.INT8), device), 2, device, normal(1, 2).to(device))
    step = gpu.SparseStep(NEURONS, 128, 2, K, Codec.INT8, "silu", True, device)
    rows = host(neurons(1, NEURONS, K, Codec.INT8), device)
    x, scores = normal(2, 2, K).to(device), normal(3, 2, NEURONS).to(device)
    layer = gpu.LayerRows.create(rows, 128, device)
    for name, args in [
        ("layer", (gpu.LayerRows.create(rows, 129, device), x, scores)),
        ("layer", (gpu.LayerRows.create(rows[:-1], 128, device), x, scores)),
        ("scores", (layer, x, scores[:1])),
        ("x", (layer, normal(2, 3, K).to(device), normal(3, 3, NEURONS).to(device))),
        ("x", (layer, normal(2, 2, 4 * K).to(device), scores)),
    ]:
        with pytest.raises(ValueError, match=f"^{name}"):
            step(*args, 0.0, torch.zeros_like(args[1]))


@pytest.mark.gpu
def test_real_sizes(cuda):
    """In a CUDA graph, which nothing that waits for the device can be captured into."""
    k, n, codec = 1536, 8960, Codec.INT4
    w = neurons(1, n, k, codec, device=cuda).cpu()
    step, layer = (
        gpu.SparseStep(n, 4096, 4, k, codec, "silu", True, cuda),
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
        expected, rows = whole(x, w.to(cuda), codec, "silu", True, y, scores, 1.5)
        graph.replay()
        assert 0 < len(rows) < n
        assert same(y, expected)
