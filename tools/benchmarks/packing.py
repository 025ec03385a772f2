#!/usr/bin/env python3
"""How fast checkpoints are packed, and how soon the first token of a pack is there, cold and warm.

    python -m tools.benchmarks.packing CHECKPOINT ... --before TREE --out docs/benchmarks/packing-NAME.json

Every figure is of a process of its own. With --before, a source tree whose extensions were built in place, that build
takes turns with this one. `rate alone` is what the processor time alone would allow on all cores: on a machine that
others use too it says more than the clock. Cold, the pack's files are dropped from the page cache before each start;
warm, they are read just before it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import site
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tools.benchmarks.harness import facts
from tools.benchmarks.harness.record import Benchmark, say
from tools.benchmarks.harness.runs import RunFailed, last_json
from tools.benchmarks.harness.samples import Sample, in_turn, only, tabulated

PACKED = {
    "wall_s": ("clock", "s"),
    "cpu_s": ("processor", "s"),
    "bytes_per_s": ("rate", "MB/s"),
    "bytes_per_s_alone": ("rate alone", "MB/s"),
    "peak_rss_bytes": ("peak memory", "bytes"),
}
STARTED = {
    "wall_s": ("process to the first token", "s"),
    "load_s": ("until generating", "s"),
    "ttft_s": ("then the token", "s"),
    "cpu_s": ("processor", "s"),
    "peak_rss_bytes": ("peak memory", "bytes"),
}
LABELS = {"model": "checkpoint", "dtype": "dtype", "build": "build"}


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = Benchmark("tools.benchmarks.packing", __doc__)
    parser = benchmark.parser
    parser.add_argument("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--dtypes", nargs="+", default=["int4", "int8"])
    parser.add_argument("--before", type=Path, help="the source tree of an earlier build")
    parser.add_argument("--repeat", type=int, default=1, help="times that everything is packed")
    parser.add_argument("--starts", type=int, default=3, help="starts of each pack, cold and warm")
    parser.add_argument("--prompt", default="The quick brown fox jumps over the lazy")
    parser.add_argument("--scratch", type=Path, help="where packs are made (a temporary directory)")
    args = benchmark.parse(arguments)
    samples = []
    for sample in measurements(args):
        samples.append(sample)
        say(line(sample))
    parameters = {name: getattr(args, name) for name in ("dtypes", "repeat", "starts", "prompt")}
    parameters["checkpoints"] = [path.name for path in args.checkpoints]
    benchmark.publish(parameters, samples, summary(samples))


def measurements(args: argparse.Namespace) -> Iterator[Sample]:
    builds = {"this": None} | ({"before": args.before} if args.before else {})
    for checkpoint in args.checkpoints:
        for dtype in args.dtypes:
            with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
                pack, labels = Path(folder) / "pack", {"model": checkpoint.stem, "dtype": dtype}
                for turn in range(args.repeat):
                    for build in in_turn(list(builds), turn):
                        _remove(pack)
                        packed = measured(builds[build], "pack", checkpoint, pack, "--dtype", dtype)
                        yield labels | {"build": build, "what": "pack", "round": turn} | rates(packed)
                for turn, warm in itertools.product(range(args.starts), (False, True)):
                    for build in in_turn(list(builds), turn):
                        set_page_cache(pack, warm)
                        begun = measured(builds[build], "run", pack, "--prompt", args.prompt, "-n", 1, "--ignore-eos")
                        yield labels | {"build": build, "what": "warm" if warm else "cold", "round": turn} | begun


def measured(tree: Path | None, *words: object) -> Sample:
    """What a command printed as JSON, its time and its memory. Raises RunFailed."""
    command, environment = flashrt_of(tree)
    began = time.perf_counter()
    command += [str(word.resolve()) if isinstance(word, Path) else str(word) for word in words]
    child = subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, env=environment, cwd=tree, text=True)
    assert child.stdout is not None
    printed = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise RunFailed(f"flashrt {' '.join(map(str, words))} failed")
    found = last_json(printed)
    sample = {
        "wall_s": time.perf_counter() - began,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_rss_bytes": usage.ru_maxrss * 1024,
    }
    return sample | {name: found[name] for name in ("bytes", "load_s", "ttft_s") if name in found}


def flashrt_of(tree: Path | None) -> tuple[list[str], dict[str, str]]:
    """A command line of this build, or of the one in a source tree, and its environment."""
    if tree is None:
        return [sys.executable, "-m", "flashrt"], dict(os.environ)
    # Without `site`, which would put this build first, where it is installed as editable.
    paths = [str(tree), str(tree / "kernels"), *site.getsitepackages()]
    return [sys.executable, "-S", "-m", "flashrt"], os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def rates(sample: Sample) -> Sample:
    cores = facts.machine()["cores"]
    alone = sample["bytes"] * cores / sample["cpu_s"]
    return sample | {"bytes_per_s": sample["bytes"] / sample["wall_s"], "bytes_per_s_alone": alone}


def set_page_cache(pack: Path, warm: bool) -> None:
    """Have the page cache hold a pack's files, or nothing of them."""
    for path in pack.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while warm and file.read(1 << 20):
                pass


def summary(samples: list[Sample]) -> dict[str, Any]:
    """Two tables: packing, and starting."""
    starts = [sample for sample in samples if sample["what"] != "pack"]
    text = (
        "Packing, then starts of the pack for one token, cold and warm, each a process. `this` is the build recorded."
    )
    tables = [tabulated(only(samples, what="pack"), LABELS, PACKED)]
    tables += [tabulated(starts, LABELS | {"what": "page cache"}, STARTED)] if starts else []
    return {"text": [text], "tables": tables}


def line(sample: Sample) -> str:
    name = f"{sample['model']} {sample['dtype']} {sample['build']:>6} {sample['what']:>4}"
    figures = f"{sample['wall_s']:7.2f} s, processor {sample['cpu_s']:7.2f} s"
    if sample["what"] == "pack":
        figures += f", {sample['bytes_per_s'] / 1e6:.1f} MB/s, alone {sample['bytes_per_s_alone'] / 1e6:.1f} MB/s"
    return f"{name}  {figures}"


def _remove(pack: Path) -> None:
    for path in pack.iterdir() if pack.exists() else ():
        path.unlink()


if __name__ == "__main__":
    main()
