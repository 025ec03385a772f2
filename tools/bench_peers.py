#!/usr/bin/env python3
"""flashrt beside llama.cpp, transformers, accelerate and AirLLM: same model, prompt, tokens, threads and memory.

    make peers
    python -m tools.bench_peers --packs INT4 INT8 --gguf Q4_K_M.gguf --checkpoint HF_DIR --caps none 1 0.8 0.6 \\
        --repeat 5 --out docs/benchmarks/peers-NAME.json

Every run is a fresh process in a memory cgroup of its own, begun with a cold page cache (so this needs root). Systems
alternate; a repetition goes through all of them under each cap, and once more with a long prompt and no cap, for
prefill. What the kernel kills is recorded as killed, what finds no end as timeout, and neither is tried more than
twice. The perplexity of each quantization is taken once, in the windows of tools/quality.py. Medians are quoted; ratios
are medians of what flashrt did over what the other did in the same repetition.
"""

from __future__ import annotations

import argparse
import bisect
import datetime
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from flashrt import __version__
from flashrt.storage.pack import Pack
from flashrt.text.tokenizer import Tokenizer
from tools import machine
from tools.peers.summary import Runs, cells, ratios
from tools.peers.systems import Flashrt, Job, Score, System, peers
from tools.run_in_cgroup import run_limited

ROOT = Path(__file__).parents[1]
GIB = 1 << 30
NO_LIMIT = 1 << 50
READ_UNIT = 512  # bytes of a block, as the kernel counts a process's reads
PROMPT = "def quicksort(items):"
TEXTS = sorted((ROOT / "tools" / "texts").glob("*.txt"))
SYSTEMS = ("flashrt", "llama.cpp", "llama.cpp --no-repack", "transformers", "accelerate", "AirLLM")
OFFLOADING = ("accelerate", "AirLLM")  # seconds per token at best
IN_MEMORY = ("flashrt", "llama.cpp", "transformers")  # worth timing at prefill
GRACE_S = 30  # between the end that a runner is given and the end that it gets
TRIES = 2  # of what comes to nothing
SHAPING = ("tokens", "capped_tokens", "slow_tokens", "prefill_tokens", "repeat", "seconds")
SCORE_TOKENS, SCORE_WINDOW = 2048, 1024  # as tools/quality.py has them


def main() -> None:
    args = arguments()
    systems = chosen(args)
    with tempfile.TemporaryDirectory() as folder:
        result = Bench(args, systems, Path(folder)).run()
    text = json.dumps(result, indent=1)
    if args.out:
        args.out.write_text(text + "\n")
    print(text if args.out is None else json.dumps(result))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", nargs="+", type=Path, required=True, help="the first runs, all are scored")
    parser.add_argument("--gguf", type=Path, required=True, help="the model for llama.cpp")
    parser.add_argument("--checkpoint", type=Path, required=True, help="the model for the others: Hugging Face, bf16")
    parser.add_argument("--flashrt", type=Path, default=Path(sys.executable).with_name("flashrt"), help="the program")
    parser.add_argument("--peers", type=Path, default=ROOT / ".peers", help="environments that `make peers` made")
    parser.add_argument("--scratch", type=Path, default=ROOT / ".peers" / "scratch", help="for the peers' own copies")
    parser.add_argument("--systems", nargs="+", default=SYSTEMS)
    parser.add_argument("--caps", nargs="+", default=["none", "1", "0.8", "0.6"], metavar="GIB", help="GiB, or none")
    parser.add_argument("--tokens", type=int, default=64, help="where all is in memory")
    parser.add_argument("--capped-tokens", type=int, default=12, help="under a cap")
    parser.add_argument("--slow-tokens", type=int, default=3, help="for those that take seconds for each")
    parser.add_argument(
        "--slow-caps",
        nargs="*",
        default=["1", "0.8"],
        metavar="GIB",
        help="caps under which those run every time; under others they run once",
    )
    parser.add_argument("--prefill-tokens", type=int, default=512, help="length of the long prompt; 0: no prefill")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=60, help="end a run after so long")
    parser.add_argument("--no-perplexity", action="store_true")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    return parser.parse_args()


def chosen(args: argparse.Namespace) -> dict[str, System]:
    """The systems asked for, in that order."""
    dtype = Pack(args.packs[0]).manifest.dtype.value
    known: dict[str, System] = {"flashrt": Flashrt(args.flashrt, args.packs[0], dtype)}
    known |= peers(args.peers, args.gguf, args.checkpoint, args.scratch)
    if unknown := set(args.systems) - set(known):
        raise SystemExit(f"no such systems: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    systems = {name: known[name] for name in args.systems}
    for system in systems.values():
        if not system.program.exists():
            raise SystemExit(f"{system.name} cannot be run: {system.program} is not there (make peers)")
    return systems


class Bench:
    """One run of the whole comparison."""

    def __init__(self, args: argparse.Namespace, systems: dict[str, System], folder: Path) -> None:
        self._args, self._systems, self._threads = args, systems, int(machine.facts()["cores"])
        self._tokenizer = Tokenizer.from_files(args.packs[0])
        self._short, self._long = folder / "short.txt", folder / "long.txt"
        self._short.write_text(PROMPT)
        if args.prefill_tokens:
            self._long.write_text(cut(self._tokenizer, TEXTS[0].read_text(), args.prefill_tokens))
        self._decode: Runs = {name: {cap: [] for cap in args.caps} for name in systems}
        self._prefill: Runs = {name: {"none": []} for name in systems if name in IN_MEMORY and args.prefill_tokens}
        self._disk: list[tuple[float, float]] = []

    def run(self) -> dict[str, Any]:
        self._prepare()
        perplexity = {} if self._args.no_perplexity else self._perplexity()
        for repetition in range(self._args.repeat):
            self._disk.append(machine.disk_rates(self._args.gguf))
            for cap in self._args.caps:
                for name in rotated(list(self._systems), repetition):
                    if repetition == 0 or self._every_time(name, cap):
                        self._measure(self._decode[name][cap], name, self._decode_job(name, cap))
            for name in rotated(list(self._prefill), repetition):
                self._measure(self._prefill[name]["none"], name, self._prefill_job())
        return self._summary(perplexity)

    def _prepare(self) -> None:
        """AirLLM splits the checkpoint by layers when first it runs, which is not what is measured."""
        airllm = self._systems.get("AirLLM")
        if airllm:
            (self._args.scratch / "airllm").mkdir(parents=True, exist_ok=True)
            job = Job(self._short, self._count(self._short), 1, "none", self._threads, 600)
            output(airllm.command(job), self._threads)

    def _every_time(self, name: str, cap: str) -> bool:
        """Slow systems run once where nothing is claimed of them. transformers is slow under any cap."""
        if name in OFFLOADING:
            return cap in self._args.slow_caps
        return name != "transformers" or cap == "none"

    def _decode_job(self, name: str, cap: str) -> Job:
        args = self._args
        if name in OFFLOADING or (name == "transformers" and cap != "none"):
            tokens = args.slow_tokens
        else:
            tokens = args.tokens if cap == "none" else args.capped_tokens
        return Job(self._short, self._count(self._short), tokens, cap, self._threads, args.seconds)

    def _prefill_job(self) -> Job:
        tokens = self._args.prefill_tokens
        return Job(self._long, tokens, 1, "none", self._threads, self._args.seconds, warm=True)

    def _count(self, prompt: Path) -> int:
        return len(self._tokenizer.encode(prompt.read_text()))

    def _measure(self, runs: list[dict[str, Any]], name: str, job: Job) -> None:
        """Add a run, or what is known already when none will come to anything."""
        if len(runs) >= TRIES and not any("first_token_s" in run for run in runs):
            return
        runs.append(measure(self._systems[name], job))
        print(f"{len(runs)}/{self._args.repeat}  {line(name, job, runs[-1])}", file=sys.stderr, flush=True)

    def _perplexity(self) -> dict[str, Any]:
        """Of every quantization. The same texts, and as many tokens of them, for all."""
        scored = [system for name, system in self._systems.items() if name in ("llama.cpp", "transformers")]
        packs = [Flashrt(self._args.flashrt, pack, Pack(pack).manifest.dtype.value) for pack in self._args.packs]
        score = Score(TEXTS, SCORE_TOKENS, SCORE_WINDOW, self._threads)
        result = {}
        for system in [*scored, *packs]:
            outputs = [output(command, self._threads) for command in system.score_commands(score)]
            label = f"{system.name} {system.weights}"
            result[label] = system.perplexity(outputs, score)
            print(f"{label}  {result[label]}", file=sys.stderr, flush=True)
        counts = {tuple(text["tokens"] for text in texts.values()) for texts in result.values()}
        if len(counts) > 1:
            raise SystemExit(f"the systems cut the texts into different numbers of tokens: {result}")
        return {"tokens": SCORE_TOKENS, "window": SCORE_WINDOW, "systems": result}

    def _summary(self, perplexity: dict[str, Any]) -> dict[str, Any]:
        args, manifest = self._args, Pack(self._args.packs[0]).manifest
        runs = [run for by_cap in self._decode.values() for results in by_cap.values() for run in results]
        outputs = {name: self._output(by_cap) for name, by_cap in self._decode.items()}
        return {
            "tool": "bench_peers",
            "command": f"python -m tools.bench_peers --packs PACKS --gguf GGUF --checkpoint HF_DIR {asked(args)}",
            "date": datetime.date.today().isoformat(),
            "machine": machine.facts() | {"disk_bytes_per_s": machine.disk_summary(self._disk)},
            "versions": {"flashrt": __version__} | {k: v for run in runs for k, v in run.get("versions", {}).items()},
            "model": manifest.name,
            "prompt": PROMPT,
            "repeat": args.repeat,
            "seconds": args.seconds,
            "systems": {name: {"weights": system.weights, **outputs[name]} for name, system in self._systems.items()},
            "decode": {name: cells(by_cap) for name, by_cap in self._decode.items()},
            "prefill": {name: cells(by_cap)["none"] for name, by_cap in self._prefill.items()},
            "prefill_tokens": args.prefill_tokens,
            "flashrt_over": ratios(self._decode, "decode_tok_per_s"),
            "flashrt_over_prefill": ratios(self._prefill, "prefill_tok_per_s"),
            "perplexity": perplexity,
        }

    def _output(self, by_cap: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
        """What a system wrote, and whether it wrote the same every time."""
        found = {tuple(run["token_ids"]) for runs in by_cap.values() for run in runs if "token_ids" in run}
        longest = max(found, key=len, default=())
        same = all(ids == longest[: len(ids)] for ids in found)
        return {"output": self._tokenizer.decode(longest), "same_tokens": same}


def measure(system: System, job: Job) -> dict[str, Any]:
    """One run: what the system says, and what was seen from outside."""
    machine.drop_page_cache()
    limit = NO_LIMIT if job.cap == "none" else int(float(job.cap) * GIB)
    read, began = blocks_read(), time.perf_counter()
    try:
        outcome = run_limited(system.command(job), limit, env=environment(job.threads), timeout=job.seconds + GRACE_S)
    except subprocess.TimeoutExpired:
        return {"status": "timeout", "wall_s": time.perf_counter() - began}
    wall_s = time.perf_counter() - began
    if not outcome.limited:
        raise SystemExit(f"no memory cgroup can be made: {outcome.why_not}")
    seen = {
        "wall_s": wall_s,
        "read_bytes": (blocks_read() - read) * READ_UNIT,
        "cgroup_peak_bytes": outcome.peak_bytes,
        "peak_rss_bytes": outcome.peak_rss_bytes,
    }
    if outcome.returncode != 0:
        status = "killed" if outcome.oom_killed else "failed"
        return seen | {"status": status, "message": outcome.stderr.strip()[-300:]}
    figures = system.figures(outcome.stdout, wall_s)
    if figures["prompt_tokens"] != job.prompt_tokens:
        raise SystemExit(
            f"{system.name} took the prompt for {figures['prompt_tokens']} tokens, not {job.prompt_tokens}"
        )
    figures["prefill_tok_per_s"] = job.prompt_tokens / figures["prefill_s"]
    status = "ok" if len(figures["token_ids"]) == job.tokens else "timeout"
    return seen | figures | {"status": status}


def line(name: str, job: Job, run: dict[str, Any]) -> str:
    what = f"{name:12} {job.cap:>5} GiB  {run['status']:8}"
    if "first_token_s" not in run:
        return f"{what}  after {run['wall_s']:.1f} s"
    peak = f"peak {run['peak_rss_bytes'] / GIB:.2f} GiB"
    if run["decode_tok_per_s"] is None:
        return f"{what}  {run['prefill_tok_per_s']:8.1f} prompt tokens/s  {peak}"
    read = f"{run['bytes_read_per_token'] / 1e6:7.1f} MB/token"
    return f"{what}  {run['decode_tok_per_s']:8.3f} tokens/s  {read}  first after {run['first_token_s']:.1f} s  {peak}"


def output(command: list[str], threads: int) -> str:
    """What a command without a limit writes to stdout."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True, env=environment(threads)
    )
    return done.stdout


def environment(threads: int) -> dict[str, str]:
    """One number of threads for whatever library counts them itself; nothing is fetched from the network."""
    return os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}


def blocks_read() -> int:
    """Blocks that ended children read from disk: the kernel's count, in which page faults and O_DIRECT are alike."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_inblock


def rotated(names: list[str], by: int) -> list[str]:
    by %= max(len(names), 1)
    return names[by:] + names[:by]


def cut(tokenizer: Tokenizer, text: str, tokens: int) -> str:
    """The shortest beginning of `text` that has this many tokens."""
    end = bisect.bisect_left(range(len(text)), tokens, key=lambda end: len(tokenizer.encode(text[:end])))
    if len(tokenizer.encode(text[:end])) != tokens:
        raise SystemExit(f"no beginning of the text has {tokens} tokens exactly: ask for another number")
    return text[:end]


def asked(args: argparse.Namespace) -> str:
    """The options that shape the figures, as they were given."""
    words = [f"--systems {shlex.join(args.systems)}", f"--caps {' '.join(args.caps)}"]
    words += [f"--slow-caps {' '.join(args.slow_caps)}"]
    words += [f"--{name.replace('_', '-')} {getattr(args, name)}" for name in SHAPING]
    return " ".join(words)


if __name__ == "__main__":
    main()
