"""Speed of the sparse FFN's kernels: bytes of chosen rows per second, beside what memory and the bus give.

`tools.benchmarks.gpu_report` calls it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flashrt_kernels import reference
from flashrt_kernels.ffn import FfnWeights
from flashrt_kernels.gpu import gather_rows, glu_rows, workspace
from flashrt_kernels.rows import Codec, bundle_stride, row_bytes

SHAPES = {"qwen2.5-1.5b": (1536, 8960), "llama-2-70b": (8192, 28672)}  # hidden, neurons
SHARES = (0.1, 0.4, 1.0)  # of the rows
TOKENS = (1, 4)
BYTES = 1 << 30  # of rows that calls take turns with: more than caches hold
CODEC = Codec.INT4
REPEAT = 15

Timer = Callable[[Sequence[Callable[[], object]]], float]  # seconds of one call


def measure() -> list[dict[str, Any]]:
    """All figures, on a CUDA device."""
    memory = memory_rate()
    results: list[dict[str, Any]] = []
    for name, (k, neurons) in SHAPES.items():
        for figures in glu_rates(k, neurons, BYTES, "cuda", graph_seconds):
            share = round(figures["bytes_per_s"] / memory, 3)
            results.append({"kernel": "glu_rows", "shape": name, **figures, "share_of_memory_rate": share})
        for figures in gather_rates(k, neurons, BYTES, "cuda", graph_seconds):
            results.append({"kernel": "gather_rows", "shape": name, **figures})
    torch.cuda.empty_cache()
    return [{"kernel": "copy on the device, read and written", "bytes_per_s": memory}, *results]


def graph_seconds(calls: Sequence[Callable[[], object]]) -> float:
    """Seconds of a call: the median of replays of a CUDA graph of all of them, so that launching costs little."""
    calls[0]()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(REPEAT):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times) / len(calls)


def memory_rate() -> int:
    """Bytes that a copy on the device reads and writes in a second."""
    source = torch.ones(BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return round(2 * BYTES / graph_seconds([partial(target.copy_, source)]))


def bundles(k: int, count: int) -> Tensor:
    """`count` bundles on the CPU: a few random neurons, repeated."""
    w = torch.randn((64 * 3, k), generator=torch.Generator().manual_seed(1)) / k**0.5
    encoded = torch.empty((64 * 3, row_bytes(CODEC, k)), dtype=torch.uint8)
    reference.quantize(w, CODEC, encoded)
    few = torch.zeros((64, bundle_stride(CODEC, k, 3)), dtype=torch.uint8)
    few[:, : 3 * encoded.shape[1]] = encoded.view(64, -1)
    return few.repeat(math.ceil(count / 64), 1)[:count]


def choose(rows: int, share: float, device: str) -> Tensor:
    """A random share of the rows, ascending: int32 [count]."""
    return torch.randperm(rows)[: round(share * rows)].sort()[0].to(torch.int32).to(device)


def glu_rates(k: int, neurons: int, nbytes: int, device: str, seconds: Timer) -> Iterator[dict[str, Any]]:
    """`glu_rows` over random shares of the rows of as many layers as have `nbytes`."""
    layer = bundles(k, neurons).to(device)
    layers = [FfnWeights(layer.clone(), CODEC, "silu", True) for _ in range(max(nbytes // layer.numel(), 1))]
    for tokens in TOKENS:
        x, y = torch.randn((tokens, k), device=device), torch.zeros((tokens, k), device=device)
        scratch = workspace(neurons, tokens, k, device)
        for share in SHARES:
            calls = [
                partial(glu_rows, x, weights, y, choose(neurons, share, device), scratch=scratch) for weights in layers
            ]
            yield {"tokens": tokens, **rate(round(share * neurons), layer.shape[1], seconds(calls))}


def gather_rates(k: int, neurons: int, nbytes: int, device: str, seconds: Timer) -> Iterator[dict[str, Any]]:
    """`gather_rows` of as many rows as shares of a layer have, from anywhere in `nbytes` of host memory."""
    host = bundles(k, max(nbytes // bundle_stride(CODEC, k, 3), 4 * neurons))
    if device == "cuda":
        host = host.pin_memory()
    out = torch.empty((neurons, host.shape[1]), dtype=torch.uint8, device=device)
    for share in SHARES:
        slots = choose(neurons, share, device)
        part = len(slots) / len(host)
        calls = [partial(gather_rows, host, choose(len(host), part, device), out, slots) for _ in range(4)]
        yield rate(len(slots), host.shape[1], seconds(calls))


def rate(rows: int, stride: int, seconds: float) -> dict[str, Any]:
    return {"rows": rows, "microseconds": round(seconds * 1e6, 1), "bytes_per_s": round(rows * stride / seconds)}
