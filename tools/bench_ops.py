"""Times the kernels against the machine: bytes of weights per second beside the RAM read rate, and GEMM FLOP/s.

    python tools/bench_ops.py [--hidden 4096] [--seconds 0.5] [--threads 2] [--out FILE]

The weights of each kernel exceed the last-level cache. Kernels of few tokens alternate with plain reads of memory;
their share of it is the median over at least five pairs. The last line of standard output is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from flashrt.budget.process import usable_cores
from flashrt_kernels import cpu
from flashrt_kernels.ffn import FfnWeights
from flashrt_kernels.rows import MATRIX_ROWS, Codec, bundle_stride, row_bytes

BYTES = 256 << 20  # of weights per kernel
WIDE = 512  # tokens of a prefill chunk


def best_seconds(call: Callable[[], object], seconds: float) -> float:
    """The shortest of the calls that fit in `seconds`, at least three, after one to warm up."""
    call()
    best, spent, calls = float("inf"), 0.0, 0
    while spent < seconds or calls < 3:
        begin = time.perf_counter()
        call()
        took = time.perf_counter() - begin
        best, spent, calls = min(best, took), spent + took, calls + 1
    return best


def beside_reads(call: Callable[[], object], nbytes: int, data: np.ndarray, seconds: float) -> dict[str, float]:
    """Bytes per second of `call`, and their share of the rate at which `data` is read, in turns: medians."""
    call()
    rates, shares, spent = [], [], 0.0
    while spent < seconds or len(rates) < 5:
        begin = time.perf_counter()
        call()
        middle = time.perf_counter()
        cpu.read_bandwidth(data)
        end = time.perf_counter()
        rates.append(nbytes / (middle - begin) / 1e9)
        shares.append(rates[-1] / (data.nbytes / (end - middle) / 1e9))
        spent += end - begin
    return {"gb_per_s": statistics.median(rates), "share": statistics.median(shares)}


def packed(codec: Codec, k: int, rows: int, total: int) -> np.ndarray:
    """About `total` bytes of bundles: a few rows are encoded, then repeated."""
    rng = np.random.default_rng(0)
    encoded = np.empty((24, row_bytes(codec, k)), np.uint8)
    cpu.quantize(rng.standard_normal((24, k), np.float32) / np.float32(k**0.5), codec, encoded)
    stride = bundle_stride(codec, k, rows)
    result = np.zeros((max(total // stride, 1), stride), np.uint8)
    result[:, : rows * encoded.shape[1]] = encoded[:rows].reshape(1, -1)
    return result


def narrow(k: int, seconds: float, data: np.ndarray) -> dict[str, dict[str, float]]:
    """GB/s of packed bytes at small batches."""
    results = {}
    for codec in (Codec.INT4, Codec.INT8, Codec.BF16):
        matrix, neurons = packed(codec, k, MATRIX_ROWS, BYTES), packed(codec, k, 3, BYTES)
        rows = MATRIX_ROWS * len(matrix)
        for tokens in (1, 2, 4, 8, 16):
            x = np.random.default_rng(1).standard_normal((tokens, k), np.float32)
            out, y = np.empty((tokens, rows), np.float32), np.zeros((tokens, k), np.float32)

            def linear(x=x, matrix=matrix, codec=codec, out=out, rows=rows) -> None:
                cpu.linear(x, matrix, codec, out, 0, rows)

            def glu(x=x, neurons=neurons, codec=codec, y=y) -> None:
                cpu.glu(x, FfnWeights(neurons, codec, "silu", True), y)

            for name, call, size in (("linear", linear, matrix.nbytes), ("glu", glu, neurons.nbytes)):
                found = beside_reads(call, size, data, seconds)
                results[f"{name}.{codec.value}.{tokens}"] = found
                print(
                    f"{name:8}{codec.value:6} B={tokens:<3} {found['gb_per_s']:6.1f} GB/s  {found['share']:4.0%}",
                    flush=True,
                )
    return results


def wide(k: int, seconds: float) -> dict[str, float]:
    """GFLOP/s of prefill chunks."""
    results = {}
    for codec in (Codec.INT4, Codec.INT8, Codec.BF16, Codec.F32):
        matrix, neurons = packed(codec, k, MATRIX_ROWS, 8 << 20), packed(codec, k, 3, 3 << 20)
        rows = MATRIX_ROWS * len(matrix)
        for tokens in (32, 128, WIDE):
            x = np.random.default_rng(1).standard_normal((tokens, k), np.float32)
            out, y = np.empty((tokens, rows), np.float32), np.zeros((tokens, k), np.float32)
            scratch = np.zeros(cpu.gemm_scratch_bytes(tokens, k, len(neurons)), np.uint8)

            def linear(x=x, matrix=matrix, codec=codec, out=out, rows=rows, scratch=scratch) -> None:
                cpu.gemm_linear(x, matrix, codec, out, 0, rows, scratch=scratch)

            def glu(x=x, neurons=neurons, codec=codec, y=y, scratch=scratch) -> None:
                cpu.gemm_glu(x, FfnWeights(neurons, codec, "silu", True), y, scratch=scratch)

            for name, call, weights in (("gemm_linear", linear, rows * k), ("gemm_glu", glu, 3 * len(neurons) * k)):
                rate = 2 * weights * tokens / best_seconds(call, seconds) / 1e9
                results[f"{name}.{codec.value}.{tokens}"] = rate
                print(f"{name:12}{codec.value:6} T={tokens:<4} {rate:6.0f} GFLOP/s", flush=True)
    return results


def attention(seconds: float, ceiling: float) -> dict[str, float]:
    """GB/s of the cache for one token, GFLOP/s for a prefill chunk; 32 heads, 8 KV heads of 128, bfloat16."""
    context, heads, kv_heads, dim = 8192, 32, 8, 128
    kv = np.random.default_rng(2).standard_normal((kv_heads, context, 2, dim), np.float32)
    kv = (kv.view(np.uint32) >> 16).astype(np.uint16)
    results = {}
    for tokens, name in ((1, "one"), (8, "eight"), (WIDE, "prefill")):
        q = np.random.default_rng(3).standard_normal((tokens, heads, dim), np.float32)
        out = np.empty((tokens, heads * dim), np.float32)
        scratch = np.zeros(cpu.attention_scratch_bytes(tokens, heads, kv_heads, dim), np.uint8)
        start = context - tokens

        def call(q=q, start=start, out=out, scratch=scratch) -> None:
            cpu.attention(q, kv, start, None, dim**-0.5, None, out, scratch)

        took = best_seconds(call, seconds)
        rate, flops = kv.nbytes / took / 1e9, 4 * tokens * heads * dim * (context - tokens / 2) / took / 1e9
        results |= {f"attention.{name}.gb_per_s": rate, f"attention.{name}.gflop_per_s": flops}
        print(f"attention B={tokens:<4} {rate:6.1f} GB/s  {rate / ceiling:4.0%}  {flops:6.0f} GFLOP/s", flush=True)
    return results


def quantizer(k: int, seconds: float) -> dict[str, float]:
    """Million weights per second, and the RMS error on normal weights beside rounding to nearest."""
    w = np.random.default_rng(4).standard_normal((512, k), np.float32)
    results = {}
    for codec in (Codec.INT4, Codec.INT8):
        rows, back = np.empty((512, row_bytes(codec, k)), np.uint8), np.empty_like(w)

        def call(codec=codec, rows=rows) -> None:
            cpu.quantize(w, codec, rows)

        rate = w.size / best_seconds(call, seconds) / 1e6
        cpu.dequantize(rows, codec, k, back)
        error = float(np.sqrt(np.mean((back - w) ** 2) / np.mean(w**2)))
        results |= {f"quantize.{codec.value}.mega_per_s": rate, f"quantize.{codec.value}.rms_error": error}
        print(f"quantize {codec.value}: {rate:.0f} M weights/s, RMS error {error:.4f}", flush=True)
    groups = w.reshape(-1, 32)
    low, high = groups.min(1, keepdims=True), groups.max(1, keepdims=True)
    step = (high - low) / 15
    plain = np.round((groups - low) / step) * step + low
    results["quantize.rtn.rms_error"] = float(np.sqrt(np.mean((plain - groups) ** 2) / np.mean(w**2)))
    print(f"rounding to nearest, groups of 32: RMS error {results['quantize.rtn.rms_error']:.4f}", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=0.3, help="time spent on each measurement")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    cpu.set_threads(arguments.threads)
    data = np.ones(BYTES, np.uint8)
    ceiling = data.nbytes / best_seconds(lambda: cpu.read_bandwidth(data), 2 * arguments.seconds) / 1e9
    print(f"{cpu.isa()}, {cpu.threads()} threads: memory is read at {ceiling:.1f} GB/s", flush=True)
    result = {
        "tool": "bench_ops",
        "command": f"python tools/bench_ops.py --hidden {arguments.hidden} --seconds {arguments.seconds}",
        "isa": cpu.isa(),
        "threads": cpu.threads(),
        "hidden": arguments.hidden,
        "read_gb_per_s": ceiling,
        "narrow": narrow(arguments.hidden, arguments.seconds, data),
        "wide_gflop_per_s": wide(arguments.hidden, arguments.seconds),
        "attention": attention(arguments.seconds, ceiling),
        "quantize": quantizer(arguments.hidden, arguments.seconds),
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
