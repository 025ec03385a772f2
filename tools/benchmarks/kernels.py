#!/usr/bin/env python3
"""Times the kernels against the machine: bytes of weights per second beside the RAM read rate, and GEMM FLOP/s.

    python -m tools.benchmarks.kernels [--hidden 4096] [--seconds 0.5] [--threads 2] [--out FILE]

The weights of each kernel exceed the last-level cache. Kernels of few tokens take turns with plain reads of memory, of
whose rate they are a share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from flashrt.machine.process import usable_cores
from flashrt_kernels import cpu
from flashrt_kernels.ffn import FfnWeights
from flashrt_kernels.rows import MATRIX_ROWS, Codec, bundle_stride, row_bytes
from tools.benchmarks.harness.record import Benchmark, say
from tools.benchmarks.harness.samples import Sample, median, tabulated, timed

BYTES = 256 << 20  # of weights per kernel
WIDE = 512  # tokens of a prefill chunk
LEAST, MOST = 5, 50  # readings of each: a record is to be read by people, too
UNITS = {
    "gb_per_s": ("GB/s", "number"),
    "share": ("of the read rate", "share"),
    "gflop_per_s": ("GFLOP/s", "number"),
    "mega_per_s": ("million weights/s", "number"),
    "rms_error": ("RMS error", "number"),
}


def timings(call: Callable[[], object], seconds: float) -> list[float]:
    """Seconds of each of the calls that fit in `seconds`, LEAST to MOST of them, after one to warm up."""
    call()
    taken: list[float] = []
    while len(taken) < LEAST or (sum(taken) < seconds and len(taken) < MOST):
        taken.append(timed(call))
    return taken


def beside_reads(call: Callable[[], object], nbytes: int, data: np.ndarray, seconds: float) -> list[Sample]:
    """Bytes per second of `call`, and their share of the rate at which `data` is read, in turn."""
    call()
    samples: list[Sample] = []
    spent = 0.0
    while len(samples) < LEAST or (spent < seconds and len(samples) < MOST):
        own, read = timed(call), timed(lambda: cpu.read_bandwidth(data))
        rate = nbytes / own / 1e9
        samples.append({"round": len(samples), "gb_per_s": rate, "share": rate / (data.nbytes / read / 1e9)})
        spent += own + read
    return samples


def packed(codec: Codec, k: int, rows: int, total: int) -> np.ndarray:
    """About `total` bytes of bundles: a few rows are encoded, then repeated."""
    rng = np.random.default_rng(0)
    encoded = np.empty((24, row_bytes(codec, k)), np.uint8)
    cpu.quantize(rng.standard_normal((24, k), np.float32) / np.float32(k**0.5), codec, encoded)
    stride = bundle_stride(codec, k, rows)
    result = np.zeros((max(total // stride, 1), stride), np.uint8)
    result[:, : rows * encoded.shape[1]] = encoded[:rows].reshape(1, -1)
    return result


def narrow(k: int, seconds: float, data: np.ndarray) -> Iterator[Sample]:
    """GB/s of packed bytes at small batches."""
    for codec in (Codec.INT4, Codec.INT8, Codec.BF16):
        matrix, neurons = packed(codec, k, MATRIX_ROWS, BYTES), packed(codec, k, 3, BYTES)
        rows = MATRIX_ROWS * len(matrix)
        for tokens in (1, 2, 4, 8, 16):
            x = np.random.default_rng(1).standard_normal((tokens, k), np.float32)
            out, y = np.empty((tokens, rows), np.float32), np.zeros((tokens, k), np.float32)
            calls = {
                "linear": (partial(cpu.linear, x, matrix, codec, out, 0, rows), matrix.nbytes),
                "glu": (partial(cpu.glu, x, FfnWeights(neurons, codec, "silu", True), y), neurons.nbytes),
            }
            for name, (call, size) in calls.items():
                case = {"group": "narrow", "op": name, "codec": codec.value, "tokens": tokens}
                yield from told([case | sample for sample in beside_reads(call, size, data, seconds)])


def wide(k: int, seconds: float) -> Iterator[Sample]:
    """GFLOP/s of prefill chunks."""
    for codec in (Codec.INT4, Codec.INT8, Codec.BF16, Codec.F32):
        matrix, neurons = packed(codec, k, MATRIX_ROWS, 8 << 20), packed(codec, k, 3, 3 << 20)
        rows = MATRIX_ROWS * len(matrix)
        for tokens in (32, 128, WIDE):
            x = np.random.default_rng(1).standard_normal((tokens, k), np.float32)
            out, y = np.empty((tokens, rows), np.float32), np.zeros((tokens, k), np.float32)
            scratch = np.zeros(cpu.gemm_scratch_bytes(tokens, k, len(neurons)), np.uint8)
            calls = {
                "gemm_linear": (partial(cpu.gemm_linear, x, matrix, codec, out, 0, rows, scratch=scratch), rows * k),
                "gemm_glu": (
                    partial(cpu.gemm_glu, x, FfnWeights(neurons, codec, "silu", True), y, scratch=scratch),
                    3 * len(neurons) * k,
                ),
            }
            for name, (call, weights) in calls.items():
                case = {"group": "wide", "op": name, "codec": codec.value, "tokens": tokens}
                rates = [2 * weights * tokens / taken / 1e9 for taken in timings(call, seconds)]
                yield from told([case | {"round": n, "gflop_per_s": rate} for n, rate in enumerate(rates)])


def attention(seconds: float) -> Iterator[Sample]:
    """GB/s of the cache for one token, GFLOP/s for a prefill chunk; 32 heads, 8 KV heads of 128, bfloat16."""
    context, heads, kv_heads, dim = 8192, 32, 8, 128
    kv = np.random.default_rng(2).standard_normal((kv_heads, context, 2, dim), np.float32)
    kv = (kv.view(np.uint32) >> 16).astype(np.uint16)
    for tokens in (1, 8, WIDE):
        q = np.random.default_rng(3).standard_normal((tokens, heads, dim), np.float32)
        out = np.empty((tokens, heads * dim), np.float32)
        scratch = np.zeros(cpu.attention_scratch_bytes(tokens, heads, kv_heads, dim), np.uint8)
        call = partial(cpu.attention, q, kv, context - tokens, None, dim**-0.5, None, out, scratch)
        flop = 4 * tokens * heads * dim * (context - tokens / 2)
        case = {"group": "attention", "op": "attention", "codec": "bf16", "tokens": tokens}
        yield from told(
            [
                case | {"round": n, "gb_per_s": kv.nbytes / taken / 1e9, "gflop_per_s": flop / taken / 1e9}
                for n, taken in enumerate(timings(call, seconds))
            ]
        )


def quantizer(k: int, seconds: float) -> Iterator[Sample]:
    """Million weights per second, and the RMS error on normal weights beside rounding to nearest."""
    w = np.random.default_rng(4).standard_normal((512, k), np.float32)
    for codec in (Codec.INT4, Codec.INT8):
        rows, back = np.empty((512, row_bytes(codec, k)), np.uint8), np.empty_like(w)
        taken = timings(partial(cpu.quantize, w, codec, rows), seconds)
        cpu.dequantize(rows, codec, k, back)
        case = {"group": "quantize", "op": "quantize", "codec": codec.value, "rms_error": rms_error(back, w)}
        yield from told([case | {"round": n, "mega_per_s": w.size / s / 1e6} for n, s in enumerate(taken)])
    groups = w.reshape(-1, 32)
    low, high = groups.min(1, keepdims=True), groups.max(1, keepdims=True)
    step = (high - low) / 15
    plain = np.round((groups - low) / step) * step + low
    case = {"group": "quantize", "op": "rounding to nearest, groups of 32", "codec": "int4", "round": 0}
    yield from told([case | {"rms_error": rms_error(plain, groups), "mega_per_s": None}])


def rms_error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2)))


def told(samples: list[Sample]) -> list[Sample]:
    """The samples of one case, once their medians are said."""
    case = samples[0]
    figures = (name for name in UNITS if name in case)
    said = ", ".join(f"{median(s[name] for s in samples) or 0:.4g} {name}" for name in figures)
    say(f"{case['op']:12} {case['codec']:5} B={case.get('tokens', '-'):<4} {said}")
    return samples


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = Benchmark("tools.benchmarks.kernels", __doc__)
    parser = benchmark.parser
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=0.3, help="time spent on each measurement")
    parser.add_argument("--threads", type=int, default=usable_cores())
    args = benchmark.parse(arguments)
    cpu.set_threads(args.threads)
    data = np.ones(BYTES, np.uint8)
    ceiling = data.nbytes / min(timings(lambda: cpu.read_bandwidth(data), 2 * args.seconds)) / 1e9
    say(f"{cpu.isa()}, {cpu.threads()} threads: memory is read at {ceiling:.1f} GB/s")
    k, seconds = args.hidden, args.seconds
    groups = {
        "narrow": (narrow(k, seconds, data), ("gb_per_s", "share")),
        "wide": (wide(k, seconds), ("gflop_per_s",)),
        "attention": (attention(seconds), ("gb_per_s", "gflop_per_s")),
        "quantize": (quantizer(k, seconds), ("mega_per_s", "rms_error")),
    }
    samples, tables = [], []
    for name, (found, figures) in groups.items():
        own = list(found)
        labels = {"op": name, "codec": "codec"} | ({} if name == "quantize" else {"tokens": "tokens"})
        tables.append(tabulated(own, labels, {figure: UNITS[figure] for figure in figures}))
        samples += own
    text = f"{cpu.isa()}, {cpu.threads()} threads, vectors of {k}: memory is read at {ceiling:.1f} GB/s at best."
    parameters = {"hidden": k, "seconds": seconds, "threads": cpu.threads(), "read_gb_per_s": ceiling}
    benchmark.publish(parameters, samples, {"text": [text], "tables": tables})


if __name__ == "__main__":
    main()
