#!/usr/bin/env python3
"""Times the kernels against the machine: bytes of weights per second beside the RAM read rate, and GEMM FLOP/s.

    python -m tools.benchmarks.kernels [--hidden 4096] [--seconds 0.5] [--threads 2] [--groups narrow wide] [--out FILE]
    python -m tools.benchmarks.kernels --groups chosen --contexts 32768 131072 --keep 1/16

The weights of each kernel exceed the last-level cache. Kernels of few tokens take turns with plain reads of memory, of
whose rate they are a share. Attention to chosen tokens takes turns with attention to all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial

import numpy as np

from flashrt.machine.process import usable_cores
from flashrt_kernels import cpu
from flashrt_kernels.ffn import FfnWeights
from flashrt_kernels.labels import label_shape
from flashrt_kernels.rows import MATRIX_ROWS, Codec, bundle_stride, row_bytes
from tools.benchmarks.harness.record import Benchmark, say
from tools.benchmarks.harness.samples import Sample, alternate, median, tabulated, timed

BYTES = 256 << 20  # of weights per kernel
WIDE = 512  # tokens of a prefill chunk
LEAST, MOST = 5, 50  # readings of each: a record is to be read by people, too
UNITS = {
    "gb_per_s": ("GB/s", "number"),
    "share": ("of the read rate", "share"),
    "gflop_per_s": ("GFLOP/s", "number"),
    "mega_per_s": ("million weights/s", "number"),
    "rms_error": ("RMS error", "number"),
    "dense_s": ("attention to all, ms", "ms"),
    "select_s": ("choosing, ms", "ms"),
    "list_s": ("attention to the chosen, ms", "ms"),
    "times": ("faster", "ratio"),
}
FEW = {"tokens": "tokens"}
TABLES: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {  # labels and figures of each group
    "narrow": (FEW, ("gb_per_s", "share")),
    "wide": (FEW, ("gflop_per_s",)),
    "attention": (FEW, ("gb_per_s", "gflop_per_s")),
    "chosen": ({"context": "context", "keep": "kept"}, ("dense_s", "select_s", "list_s", "times")),
    "quantize": ({}, ("mega_per_s", "rms_error")),
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


class Chosen:
    """One token of 12 heads, 2 KV heads of 128, bfloat16; 32 of a key's numbers are its labels, 8 tokens a block.

    What it attends to: the first block, the newest 32 tokens and more, and the heaviest share `keep` of all blocks.
    """

    HEADS, KV_HEADS, DIM, CHANNELS, BLOCK, RECENT = 12, 2, 128, 32, 8, 4
    SCALE = DIM**-0.5

    def __init__(self, context: int, keep: Fraction) -> None:
        rng = np.random.default_rng(2)
        self.q = rng.standard_normal((1, self.HEADS, self.DIM), np.float32)
        self.kv = np.zeros((self.KV_HEADS, context, 2, self.DIM), np.uint16)
        self.labels = np.zeros(label_shape(self.KV_HEADS, context, self.CHANNELS), np.uint8)
        low, self.step = (np.full((self.KV_HEADS, self.CHANNELS), number, np.float32) for number in (-3, 0.4))
        for start in range(0, context, 1024):
            k, v = rng.standard_normal((2, min(1024, context - start), self.KV_HEADS, self.DIM), np.float32)
            cpu.kv_append(k, v, self.kv, start)
            cpu.label_append(np.ascontiguousarray(k[:, :, : self.CHANNELS]), low, self.step, self.labels, start)
        blocks = context // self.BLOCK
        kept = min(max(int(blocks * keep), 1), blocks - self.RECENT - 1)
        self.ends = np.array([blocks - self.RECENT], np.int32)
        self.keep = np.full((1, self.KV_HEADS), kept, np.int32)
        self.always = np.array([0, *range(blocks - self.RECENT, blocks)], np.int32)
        self.chosen, self.counts = np.zeros((1, self.KV_HEADS, kept), np.int32), np.zeros_like(self.keep)
        self.out = np.empty((1, self.HEADS * self.DIM), np.float32)
        shape = (self.HEADS, self.KV_HEADS, self.DIM)
        self.scratch = np.zeros(
            max(
                cpu.attention_scratch_bytes(1, *shape),
                cpu.attention_list_scratch_bytes(1, *shape),
                cpu.select_scratch_bytes(self.HEADS, self.KV_HEADS, context, self.BLOCK),
            ),
            np.uint8,
        )

    def dense(self) -> None:
        context = self.kv.shape[1]
        cpu.attention(self.q, self.kv, context - 1, None, self.SCALE, None, self.out, self.scratch)

    def select(self) -> None:
        q = self.q[:, :, : self.CHANNELS].copy()
        given = (self.SCALE, 1, self.ends, self.keep, self.BLOCK)
        cpu.select(q, self.labels, self.step, *given, self.chosen, self.counts, self.scratch)

    def attend(self) -> None:
        always = np.broadcast_to(self.always, (1, self.KV_HEADS, len(self.always)))
        blocks = np.concatenate((always[:, :, :1], self.chosen, always[:, :, 1:]), 2)
        tokens = blocks[..., None] * self.BLOCK + np.arange(self.BLOCK)
        lists = tokens.reshape(1, self.KV_HEADS, -1).astype(np.int32)
        counts = np.full((1, self.KV_HEADS), lists.shape[2], np.int32)
        cpu.attention_list(self.q, self.kv, None, lists, counts, self.SCALE, None, self.out, self.scratch)

    def rounds(self, count: int) -> Iterator[Sample]:
        self.dense()
        pairs = alternate(count, lambda: (timed(self.dense),), lambda: (timed(self.select), timed(self.attend)))
        for n, ((dense,), (select, attend)) in enumerate(pairs):
            times = dense / (select + attend)
            yield {"round": n, "dense_s": dense, "select_s": select, "list_s": attend, "times": times}


def chosen(contexts: Sequence[int], keep: Fraction, seconds: float) -> Iterator[Sample]:
    """Seconds of attention to all tokens of a context, and of choosing some and attending to these, in turn."""
    for context in contexts:
        case = Chosen(context, keep)
        count = min(max(int(seconds / timed(case.dense)), LEAST), MOST)
        labels = {"group": "chosen", "op": "select, attention_list", "codec": "bf16", "tokens": 1}
        labels |= {"context": context, "keep": str(keep)}
        yield from told([labels | sample for sample in case.rounds(count)])


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
    context = f" of {case['context']}" if "context" in case else ""
    say(f"{case['op']:12} {case['codec']:5} B={case.get('tokens', '-'):<4} {said}{context}")
    return samples


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = Benchmark("tools.benchmarks.kernels", __doc__)
    parser = benchmark.parser
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=0.3, help="time spent on each measurement")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--groups", nargs="+", choices=TABLES, default=list(TABLES), help="what to time (default: all)")
    parser.add_argument("--contexts", type=int, nargs="+", default=[32768, 131072], help="tokens to choose among")
    parser.add_argument("--keep", type=Fraction, default=Fraction(1, 16), help="share of them that is chosen")
    args = benchmark.parse(arguments)
    cpu.set_threads(args.threads)
    data = np.ones(BYTES, np.uint8)
    ceiling = data.nbytes / min(timings(lambda: cpu.read_bandwidth(data), 2 * args.seconds)) / 1e9
    say(f"{cpu.isa()}, {cpu.threads()} threads: memory is read at {ceiling:.1f} GB/s")
    k, seconds = args.hidden, args.seconds
    groups = {
        "narrow": narrow(k, seconds, data),
        "wide": wide(k, seconds),
        "attention": attention(seconds),
        "chosen": chosen(args.contexts, args.keep, seconds),
        "quantize": quantizer(k, seconds),
    }
    samples, tables = [], []
    for name in args.groups:
        own, (labels, figures) = list(groups[name]), TABLES[name]
        titles = {figure: UNITS[figure] for figure in figures}
        tables.append(tabulated(own, {"op": name, "codec": "codec", **labels}, titles))
        samples += own
    text = f"{cpu.isa()}, {cpu.threads()} threads, vectors of {k}: memory is read at {ceiling:.1f} GB/s at best."
    parameters = {"hidden": k, "seconds": seconds, "threads": cpu.threads(), "read_gb_per_s": ceiling}
    benchmark.publish(parameters, samples, {"text": [text], "tables": tables})


if __name__ == "__main__":
    main()
