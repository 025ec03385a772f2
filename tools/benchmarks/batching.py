#!/usr/bin/env python3
"""`flashrt batch` beside the same prompts one after the other with drafts, and beside llama.cpp's parallel slots.

    python -m tools.benchmarks.batching PACK --gguf FILE --peer-python PYTHON --budget-gb 0.6 --out RECORD.json

Each system runs in a process of its own, within a memory cgroup of the budget. Loading is not counted. One after the
other, and under the cap llama.cpp, are so slow that a part of the work has to do: tokens/s are compared. Texts of
flashrt's two ways are compared to the letter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashrt.storage.pack import Pack
from tools.benchmarks.harness import facts
from tools.benchmarks.harness.record import Benchmark, say
from tools.benchmarks.harness.samples import Sample, table
from tools.run_in_cgroup import run_limited

GIB = 1 << 30
UNLIMITED = 1 << 50
HERE = Path(__file__).parent
TASKS = (
    "Write a function that reverses a linked list.",
    "Explain what a mutex is, with an example.",
    "def quicksort(items):",
    "Write a query that counts orders by customer.",
    "How does a hash table find an entry?",
    "class LeastRecentlyUsed:",
    "Say in two sentences what a compiler does.",
    "for line in sys.stdin:",
)


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = Benchmark("tools.benchmarks.batching", __doc__)
    parser = benchmark.parser
    parser.add_argument("pack", type=Path)
    parser.add_argument("--gguf", type=Path, help="of the same model, for llama.cpp")
    parser.add_argument("--peer-python", type=Path, help="of an environment that has llama-cpp-python")
    parser.add_argument("--budget-gb", type=float, help="also the cgroup's; omitted: no limit")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--single", type=int, default=8, help="requests that are computed one after the other")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--sequences", type=int, nargs="*", default=(), help="beside the planner's choice")
    parser.add_argument("--slots", type=int, nargs="*", default=(16, 64), help="of llama.cpp")
    parser.add_argument("--no-repack", action="store_true", help="of llama.cpp: as it is done under a cap in any case")
    parser.add_argument("--seconds", type=float, default=60.0, help="of llama.cpp, at most")
    parser.add_argument("--cache-dir", type=Path, help="of flashrt")
    args = benchmark.parse(arguments)
    prompts = [f"{TASKS[i % len(TASKS)]} Variant {i} of {args.requests}, short." for i in range(args.requests)]
    with tempfile.TemporaryDirectory() as folder:
        runs = _Runs(args, prompts, Path(folder))
        single = runs.one_by_one()
        samples = [single, *(runs.together(number) for number in (None, *args.sequences))]
        if args.peer_python is not None:
            samples += [runs.llama_cpp(slots) for slots in args.slots]
    parameters = facts.pack(args.pack) | {
        name: getattr(args, name) for name in ("budget_gb", "requests", "single", "tokens")
    }
    benchmark.publish(parameters, samples, _summary(samples, parameters))


class _Runs:
    def __init__(self, args: Any, prompts: list[str], folder: Path) -> None:
        self._args, self._prompts, self._folder = args, prompts, folder
        self._limit = UNLIMITED if args.budget_gb is None else int(args.budget_gb * GIB)
        self._texts: list[str] = []
        (folder / "prompts.json").write_text(json.dumps(prompts))
        name = Pack(args.pack).manifest.name
        with (folder / "in.jsonl").open("w") as handle:
            for i, prompt in enumerate(prompts):
                body = {"model": name, "prompt": prompt, "max_tokens": args.tokens, "temperature": 0}
                request = {"custom_id": str(i), "method": "POST", "url": "/v1/completions"}
                handle.write(json.dumps(request | {"body": body | {"ignore_eos": True}}) + "\n")

    def one_by_one(self) -> Sample:
        args = self._args
        command = [sys.executable, "-m", "tools.benchmarks.one_by_one", str(args.pack), self._path("prompts.json")]
        command += ["--count", str(args.single), "--tokens", str(args.tokens)]
        found = self._run([*command, *self._budget()])
        self._texts = found.pop("texts", [])
        return self._sample("one after the other, drafts on", 1, found)

    def together(self, sequences: int | None) -> Sample:
        args, out = self._args, self._folder / f"out-{sequences}.jsonl"
        command = [sys.executable, "-m", "flashrt", "batch", str(args.pack), self._path("in.jsonl"), str(out), "--json"]
        command += [] if sequences is None else ["--sequences", str(sequences)]
        found = self._run([*command, *self._budget()])
        answers = {record["custom_id"]: record for record in map(json.loads, out.read_text().splitlines())}
        texts = [answers[str(i)]["response"]["body"]["choices"][0]["text"] for i in range(len(self._texts))]
        name = "together" if sequences is None else f"together, {sequences} asked for"
        found["same_texts"] = texts == self._texts
        return self._sample(name, found.get("sequences", 0), found)

    def llama_cpp(self, slots: int) -> Sample:
        args = self._args
        with args.gguf.open("rb") as file:  # or the cap would not count what is there already
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        script = HERE / "peers" / "run_llama_cpp_batch.py"
        command = [str(args.peer_python), str(script), str(args.gguf), self._path("prompts.json")]
        command += ["--slots", str(slots), "--tokens", str(args.tokens), "--seconds", str(args.seconds)]
        command += ["--no-repack"] if args.no_repack or args.budget_gb is not None else []
        return self._sample(f"llama.cpp, {slots} slots", slots, self._run(command))

    def _path(self, name: str) -> str:
        return str(self._folder / name)

    def _budget(self) -> list[str]:
        args = self._args
        budget = [] if args.budget_gb is None else ["--budget-gb", str(args.budget_gb)]
        return budget + ([] if args.cache_dir is None else ["--cache-dir", str(args.cache_dir)])

    def _run(self, command: list[str]) -> dict[str, Any]:
        """Figures of the last line of a command's output; a `failure` where there is none."""
        limit = self._limit
        try:
            result = run_limited(command, limit, timeout=6 * self._args.seconds)
        except subprocess.TimeoutExpired:
            return {"failure": "timeout"}
        if result.returncode:
            return {"failure": "killed for memory" if result.oom_killed else result.stderr[-300:]}
        return json.loads(result.stdout.splitlines()[-1]) | {"peak_bytes": result.peak_bytes}

    def _sample(self, system: str, sequences: int, found: dict[str, Any]) -> Sample:
        kept = ("tokens", "seconds", "tok_per_s", "rows_per_pass", "passes", "peak_bytes", "same_texts", "failure")
        sample = {"system": system, "sequences": sequences} | {name: found[name] for name in kept if name in found}
        say(json.dumps(sample))
        return sample


def _summary(samples: list[Sample], parameters: dict[str, Any]) -> dict[str, Any]:
    single = samples[0].get("tok_per_s")
    best, peer = (_best(samples, system) for system in ("together", "llama.cpp"))
    budget = parameters["budget_gb"]
    where = "without a limit" if budget is None else f"in a memory cgroup of {budget} GiB"
    text = (
        f"{parameters['model']}, {parameters['requests']} prompts with {parameters['tokens']} new tokens each, greedy, "
        f"{where}. One after the other: the first {parameters['single']} of them. Loading is not counted."
    )
    ratios = {
        "over one after the other": best / single if best and single else None,
        "over llama.cpp": best / peer if best and peer else None,
    }
    said = [f"{ratio:.2f}× {name}" for name, ratio in ratios.items() if ratio]
    figures = {
        "sequences": ("sequences", "number"),
        "tok_per_s": ("tokens/s", "number"),
        "tokens": ("tokens", "number"),
        "seconds": ("time", "s"),
        "peak_bytes": ("peak, page cache included", "bytes"),
        "same_texts": "same texts",
        "failure": "failed",
    }
    rows = [[s["system"], *(_shown(s.get(name)) for name in figures)] for s in samples]
    said_so = [f"Together: {', '.join(said)}."] if said else []
    return {"text": [text, *said_so], "tables": [table(["system", *figures.values()], rows)]}


def _shown(value: Any) -> Any:
    return {True: "yes", False: "no", None: ""}[value] if value is None or isinstance(value, bool) else value


def _best(samples: list[Sample], system: str) -> float | None:
    """The most tokens per second of a system, whatever it was asked for."""
    return max((s["tok_per_s"] for s in samples if s["system"].startswith(system) and "tok_per_s" in s), default=None)


if __name__ == "__main__":
    main()
