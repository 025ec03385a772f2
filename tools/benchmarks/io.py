#!/usr/bin/env python3
"""The I/O engine's rate beside fio's at each block size and depth, in order, at random, and for merged rows.

    python -m tools.benchmarks.io FILE_OR_PACK --out docs/benchmarks/io-NAME.json

Where fio is not on the path, plain O_DIRECT reads by threads are the reference. Engine and reference alternate, since a
disk's rate wanders; ratios are taken pair by pair, and medians are quoted. `cores` is user and system time of the
process over wall time. Rows are a random share of a matrix's, in ascending order, as one layer's neurons would be asked
for; the reference then reads blocks of the sizes that the merged reads have.
"""

from __future__ import annotations

import itertools
import json
import mmap
import os
import random
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashrt.machine.disk import sequential_rate
from flashrt.storage import _io
from flashrt.storage.cost import CostCurve
from flashrt.storage.direct import open_direct
from flashrt.storage.layout import PAGE
from flashrt.storage.meter import Meter
from flashrt.storage.pack import Pack, is_pack
from flashrt.storage.reader import CHUNK_BYTES, DEPTH, STAGING_BYTES
from tools.benchmarks.harness.record import Benchmark, say
from tools.benchmarks.harness.samples import Sample, alternate, median, tabulated

KIB = 1 << 10
BLOCKS = (4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, 1024 * KIB, 4096 * KIB)
DEPTHS = (1, 8, 32)
ROW_BYTES = (832, 1664, 4160)  # neurons of models of 0.3 to 2 billion weights
SHARES = (0.05, 0.2, 0.4)  # of a matrix's rows that are asked for
ROWS = 8192  # of the matrix
REQUESTS = 8  # matrices that are read per turn, one after the other
BESIDE = {
    "bytes_per_s": ("engine", "MB/s"),
    "reference_bytes_per_s": ("reference", "MB/s"),
    "ratio": ("ratio", "ratio"),
    "cores": ("cores", "number"),
    "reference_cores": ("reference's cores", "number"),
}


@dataclass(frozen=True, slots=True)
class Reading:
    rate: float  # bytes per second
    cores: float


@dataclass(frozen=True, slots=True)
class Setting:
    path: Path
    backend: str
    seconds: float
    repeat: int
    fio: str | None
    limit: int  # bytes of the file that are read


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = Benchmark("tools.benchmarks.io", __doc__)
    parser = benchmark.parser
    parser.add_argument("path", type=Path, help="a large file, or a pack")
    parser.add_argument("--blocks", type=int, nargs="+", default=BLOCKS, metavar="BYTES")
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS, metavar="N")
    parser.add_argument("--seconds", type=float, default=0.5, help="of one reading")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--limit-mib", type=int, default=256, help="of the file, read over and over")
    parser.add_argument("--backend", default="", help="io_uring or pread; the better one by default")
    parser.add_argument("--plain", action="store_true", help="compare with plain reads, even where there is fio")
    args = benchmark.parse(arguments)
    path = Pack(args.path).largest_file if is_pack(args.path) else args.path
    fio = None if args.plain else shutil.which("fio")
    limit = min(path.stat().st_size, args.limit_mib << 20)
    setting = Setting(path, args.backend, args.seconds, args.repeat, fio, limit)
    sequential_rate(path, limit)  # some disks are slow when a place is read for the first time
    with Meter(path, args.backend, limit=limit) as meter:
        cases = itertools.product(("in order", "random"), args.blocks, args.depths)
        blocks = [sample for case in cases for sample in measure_blocks(setting, meter, *case)]
        rates = meter.curve(DEPTH)
        backend = meter.backend
    cases = itertools.product(ROW_BYTES, SHARES)
    rows = [sample for case in cases for sample in measure_rows(setting, CostCurve(rates), *case)]
    parameters = {
        "backend": backend,
        "reference": "fio, io_uring" if fio else "plain O_DIRECT reads by threads",
        "bytes_read_of_file": limit,
        "repeat": args.repeat,
        "seconds": args.seconds,
        "curve": {str(block): rate for block, rate in rates.items()},
    }
    benchmark.publish(parameters, blocks + rows, summary(parameters, blocks, rows))


def measure_blocks(setting: Setting, meter: Meter, order: str, block: int, depth: int) -> list[Sample]:
    in_order = order == "in order"
    pairs = alternate(
        setting.repeat,
        lambda: timed(lambda: meter.rate(block, depth, setting.seconds, in_order)),
        lambda: reference(setting, Counter([block]), depth, in_order),
    )
    samples = figures({"order": order, "block": block, "depth": depth}, pairs)
    tell(f"{order:>8}  {block // KIB:5} KiB x {depth:<2}", samples)
    return samples


def measure_rows(setting: Setting, curve: CostCurve, row_bytes: int, share: float) -> list[Sample]:
    """Rows of one matrix after the other: merged by the curve beside the reference, then once more without merging."""
    matrices = _Rows(setting, row_bytes, share)
    try:
        sizes = matrices.merge_by(curve)
        pairs = alternate(
            setting.repeat,
            lambda: timed(matrices.rate),
            lambda: reference(setting, sizes, DEPTH, in_order=False),
        )
        seconds = matrices.seconds
        matrices.merge_by(None)
        unmerged = [timed(matrices.rate).rate for _ in range(setting.repeat)]
        unmerged_s = matrices.seconds
    finally:
        matrices.close()
    reads, read_bytes = sizes.total(), sum(size * count for size, count in sizes.items())
    case = {
        "row_bytes": row_bytes,
        "share": share,
        "depth": DEPTH,
        "rows_per_read": matrices.rows / reads,
        "bytes_per_read": read_bytes / reads,
        "useful": matrices.rows * row_bytes / read_bytes,
    }
    samples = figures(case, pairs)
    for sample, merged_s, apart_s, apart in zip(samples, seconds, unmerged_s, unmerged, strict=True):
        sample |= {"s_per_matrix": merged_s, "s_per_matrix_unmerged": apart_s, "unmerged_bytes_per_s": apart}
        sample["time_over_unmerged"] = merged_s / apart_s
    tell(f"{row_bytes:>5} B rows, {share:4.0%}, in reads of {read_bytes / reads / KIB:3.0f} KiB", samples)
    return samples


def figures(case: Sample, pairs: list[tuple[Reading, Reading]]) -> list[Sample]:
    """A sample for each pair of readings."""
    return [
        case
        | {
            "round": turn,
            "bytes_per_s": one.rate,
            "reference_bytes_per_s": two.rate,
            "ratio": one.rate / two.rate,
            "cores": one.cores,
            "reference_cores": two.cores,
        }
        for turn, (one, two) in enumerate(pairs)
    ]


def tell(what: str, samples: list[Sample]) -> None:
    point = {name: median(sample[name] for sample in samples) for name in BESIDE}
    engine, other = point["bytes_per_s"] / 1e6, point["reference_bytes_per_s"] / 1e6
    say(
        f"{what}  {engine:7.0f} MB/s  reference {other:7.0f}  ratio {point['ratio']:.2f}  "
        f"cores {point['cores']:.2f} and {point['reference_cores']:.2f}"
    )


def summary(parameters: dict[str, Any], blocks: list[Sample], rows: list[Sample]) -> dict[str, Any]:
    text = (
        f"The I/O engine ({parameters['backend']}) beside {parameters['reference']}, in turn: "
        f"{parameters['repeat']} readings of {parameters['seconds']} s, ratios taken pair by pair, cores busy in user "
        "and system time."
    )
    labels = {"order": "reads", "block": ("of", "KiB"), "depth": "in flight"}
    of_rows = {"row_bytes": "rows of, bytes", "share": ("asked for", "share")}
    merged = {"rows_per_read": ("rows per read", "number"), "bytes_per_read": ("mean read", "KiB")}
    unmerged = {"time_over_unmerged": ("time, over unmerged", "ratio")}
    tables = [tabulated(blocks, labels, BESIDE), tabulated(rows, of_rows, merged | BESIDE | unmerged)]
    return {"text": [text], "tables": tables}


class _Rows:
    """Random rows of several matrices in a file, one request each, two requests at a time."""

    def __init__(self, setting: Setting, row_bytes: int, share: float) -> None:
        self._handle, self._direct = open_direct(setting.path)
        staging = np.frombuffer(mmap.mmap(-1, STAGING_BYTES), np.uint8)
        self._engine = _io.Engine(setting.backend, DEPTH, CHUNK_BYTES, staging)
        self._row_bytes, self._seconds = row_bytes, setting.seconds
        size = setting.limit
        rows = min(ROWS, size // row_bytes)
        choice = np.random.default_rng(0)
        self._wanted = []
        for _ in range(REQUESTS):
            start = int(choice.integers(0, size - rows * row_bytes + 1))
            ids = np.sort(choice.choice(rows, max(int(share * rows), 1), replace=False))
            self._wanted.append(start + ids * row_bytes)
        self._out = np.zeros((len(self._wanted[0]), row_bytes), np.uint8)
        self._slots = np.arange(len(self._out))
        self.seconds: list[float] = []

    @property
    def rows(self) -> int:
        return sum(map(len, self._wanted))

    def merge_by(self, curve: CostCurve | None) -> Counter[int]:
        """Merge by `curve`, or not at all. How many reads of which sizes that makes, in bytes."""
        costs = [] if curve is None else curve.table(self._engine.max_span_pages)
        self._engine.set_costs(costs)
        self.seconds = []
        sizes: Counter[int] = Counter()
        for offsets in self._wanted:
            for first, last in _io.spans(offsets, self._row_bytes, costs):
                end = -(-(int(offsets[last - 1]) + self._row_bytes) // PAGE)
                sizes[PAGE * (end - int(offsets[first]) // PAGE)] += 1
        return sizes

    def rate(self) -> float:
        """Bytes per second, gaps included."""
        before, began = self._engine.bytes_read, time.perf_counter()
        flying: list[_io.Read] = []
        done = 0
        for offsets in itertools.cycle(self._wanted):
            done += 1
            flying.append(self._engine.read_rows(self._handle, self._direct, offsets, self._out, self._slots))
            if len(flying) > 1:
                _finish(flying.pop(0))
            if time.perf_counter() - began > self._seconds:
                break
        for read in flying:
            _finish(read)
        passed = time.perf_counter() - began
        self.seconds.append(passed / done)
        return (self._engine.bytes_read - before) / passed

    def close(self) -> None:
        self._engine.close()
        os.close(self._handle)


def timed(rate: Callable[[], float]) -> Reading:
    began, cpu = time.perf_counter(), time.process_time()
    value = rate()
    return Reading(value, (time.process_time() - cpu) / (time.perf_counter() - began))


def reference(setting: Setting, sizes: Counter[int], depth: int, in_order: bool) -> Reading:
    """Reads of these sizes, as often as they are counted."""
    if setting.fio is None:
        return timed(lambda: plain_rate(setting, sizes, depth, in_order))
    command = [setting.fio, "--name=reference", f"--filename={setting.path}", "--readonly", "--direct=1"]
    command += ["--ioengine=io_uring", f"--rw={'read' if in_order else 'randread'}", f"--bssplit={bssplit(sizes)}"]
    command += [f"--iodepth={depth}", "--time_based", f"--runtime={max(round(setting.seconds * 1000), 1)}ms"]
    command += [f"--size={setting.limit}", "--norandommap", "--randrepeat=0", "--output-format=json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    return Reading(job["read"]["bw_bytes"], (job["usr_cpu"] + job["sys_cpu"]) / 100)


def bssplit(sizes: Counter[int]) -> str:
    """Sizes and whole percentages, as fio wants them."""
    shares = {size: round(100 * count / sizes.total()) for size, count in sizes.items()}
    most = max(shares, key=lambda size: shares[size])
    shares[most] += 100 - sum(shares.values())
    return ":".join(f"{size}/{share}" for size, share in shares.items() if share > 0)


def plain_rate(setting: Setting, sizes: Counter[int], depth: int, in_order: bool) -> float:
    """Bytes per second of `depth` threads that each read one block after the other."""
    handle, _ = open_direct(setting.path)
    largest = max(sizes)
    places = setting.limit // largest
    turn = itertools.count()
    totals = [0] * depth
    began = time.perf_counter()

    def work(index: int) -> None:
        choice = random.Random(index)
        blocks = choice.choices(list(sizes), list(sizes.values()), k=1000)
        with mmap.mmap(-1, largest) as buffer, memoryview(buffer) as view:
            for block in itertools.cycle(blocks):
                place = next(turn) % places if in_order else choice.randrange(places)
                totals[index] += os.preadv(handle, [view[:block]], place * largest)
                if time.perf_counter() - began > setting.seconds:
                    break

    threads = [threading.Thread(target=work, args=(i,)) for i in range(depth)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(handle)
    return sum(totals) / (time.perf_counter() - began)


def _finish(read: _io.Read) -> None:
    status = read.wait()
    if status != 0:
        raise SystemExit(f"a read failed at byte {read.at}: status {status}")


if __name__ == "__main__":
    main()
