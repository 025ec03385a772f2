#!/usr/bin/env python3
"""flashrt beside llama.cpp, transformers, accelerate and AirLLM: same model, prompt, tokens, threads and memory.

    make peers
    python -m tools.benchmarks.peers --packs INT4 INT8 --gguf Q4_K_M.gguf --checkpoint HF_DIR --caps none 1 0.8 0.6 \\
        --repeat 5 --out docs/benchmarks/peers-NAME.json

flashrt decodes without drafts. Every run is a fresh process in a memory cgroup of its own, begun with a cold page cache
(so this needs root). Systems take turns at going first; a repetition goes through all of them under each cap, and once
more with a long prompt and no cap, for prefill. What the kernel kills is recorded as killed, what finds no end as
timeout, and neither is tried more than twice. The perplexity of each quantization is taken once, in the windows of
tools.benchmarks.quality. Ratios are of what flashrt did over what the other did in the same repetition; where a peer
has several ways to run, the best of them for each cap counts, and the others are told.
"""

from __future__ import annotations

import argparse
import bisect
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashrt.storage.pack import Pack
from flashrt.text.tokenizer import Tokenizer
from tools.benchmarks.harness import facts, runs
from tools.benchmarks.harness.disk import plain_rates
from tools.benchmarks.harness.record import Benchmark, say
from tools.benchmarks.harness.samples import Sample, in_turn, only
from tools.benchmarks.peers.summary import Comparison, summary
from tools.benchmarks.peers.systems import Flashrt, Job, Score, System, peers
from tools.benchmarks.prompts import COMPLETION
from tools.benchmarks.quality import TEXTS
from tools.run_in_cgroup import run_limited

READ_UNIT = 512  # bytes of a block, as the kernel counts a process's reads
ENVIRONMENTS = facts.ROOT / ".peers"
SYSTEMS = ("flashrt", "llama.cpp", "llama.cpp --no-repack", "transformers", "accelerate", "AirLLM")
OFFLOADING = ("accelerate", "AirLLM")  # seconds per token at best
IN_MEMORY = ("flashrt", "llama.cpp", "llama.cpp --no-repack", "transformers")  # worth timing at prefill
GRACE_S = 30  # between the end that a runner is given and the end that it gets
TRIES = 2  # of what comes to nothing
SETTINGS = ("caps", "slow_caps", "tokens", "capped_tokens", "slow_tokens", "prefill_tokens", "repeat", "seconds")
SCORE_TOKENS, SCORE_WINDOW = 2048, 1024  # as quality has them


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = Benchmark("tools.benchmarks.peers", __doc__)
    add_options(benchmark.parser)
    args = benchmark.parse(arguments)
    systems = chosen(args)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, systems, Path(folder))
        bench.run()
    parameters = facts.pack(args.packs[0]) | {"prompt": COMPLETION} | {name: getattr(args, name) for name in SETTINGS}
    parameters |= {"perplexity_tokens": SCORE_TOKENS, "perplexity_window": SCORE_WINDOW}
    parameters["systems"] = {name: system.weights for name, system in systems.items()}
    outputs = {name: bench.output(name) for name in systems}
    comparison = Comparison(parameters, bench.samples, {name: found["same"] for name, found in outputs.items()})
    told = {"outputs": outputs} | summary(comparison)
    benchmark.publish(parameters, bench.samples, told, versions=bench.versions)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--packs", nargs="+", type=Path, required=True, help="the first runs, all are scored")
    parser.add_argument("--gguf", type=Path, required=True, help="the model for llama.cpp")
    parser.add_argument("--checkpoint", type=Path, required=True, help="the model for the others: Hugging Face, bf16")
    parser.add_argument("--flashrt", type=Path, default=Path(sys.executable).with_name("flashrt"), help="the program")
    parser.add_argument("--peers", type=Path, default=ENVIRONMENTS, help="environments that `make peers` made")
    parser.add_argument("--scratch", type=Path, default=ENVIRONMENTS / "scratch", help="for the peers' own copies")
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


def chosen(args: argparse.Namespace) -> dict[str, System]:
    """The systems asked for, in that order."""
    known: dict[str, System] = {"flashrt": Flashrt(args.flashrt, args.packs[0], facts.pack(args.packs[0])["dtype"])}
    known |= peers(args.peers, args.gguf, args.checkpoint, args.scratch)
    if unknown := set(args.systems) - set(known):
        raise SystemExit(f"no such systems: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    systems = {name: known[name] for name in args.systems}
    for system in systems.values():
        if not system.program.exists():
            raise SystemExit(f"{system.name} cannot be run: {system.program} is not there (make peers)")
    return systems


class Bench:
    """One run of the whole comparison: `samples` of the phases disk, decode, prefill and perplexity."""

    def __init__(self, args: argparse.Namespace, systems: dict[str, System], folder: Path) -> None:
        self._args, self._systems, self._threads = args, systems, int(facts.machine()["cores"])
        self._tokenizer = Tokenizer.from_files(args.packs[0])
        self._short, self._long = folder / "short.txt", folder / "long.txt"
        self._short.write_text(COMPLETION)
        if args.prefill_tokens:
            self._long.write_text(cut(self._tokenizer, TEXTS[0].read_text(), args.prefill_tokens))
        self._tokens: dict[str, set[tuple[int, ...]]] = {name: set() for name in systems}
        self.samples: list[Sample] = []
        self.versions: dict[str, str] = {}

    def run(self) -> None:
        self._prepare()
        if not self._args.no_perplexity:
            self._score()
        long_prompt = [name for name in self._systems if name in IN_MEMORY and self._args.prefill_tokens]
        for turn in range(self._args.repeat):
            self.samples.append({"phase": "disk", "round": turn} | plain_rates(self._args.gguf))
            for cap in self._args.caps:
                for name in in_turn(list(self._systems), turn):
                    if turn == 0 or self._every_time(name, cap):
                        self._measure("decode", turn, name, self._decode_job(name, cap))
            for name in in_turn(long_prompt, turn):
                self._measure("prefill", turn, name, self._prefill_job())

    def output(self, name: str) -> dict[str, Any]:
        """What a system wrote, and whether it wrote the same every time."""
        found = self._tokens[name]
        longest = max(found, key=len, default=())
        same = all(ids == longest[: len(ids)] for ids in found)
        return {"text": self._tokenizer.decode(longest), "same": same}

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

    def _measure(self, phase: str, turn: int, name: str, job: Job) -> None:
        """Add a run, unless it is known already that none will come to anything."""
        labels = {"phase": phase, "system": name, "cap": job.cap}
        earlier = only(self.samples, **labels)
        if len(earlier) >= TRIES and not any("first_token_s" in sample for sample in earlier):
            return
        run = measure(self._systems[name], job)
        self.versions |= run.pop("versions", {})
        ids = run.pop("token_ids", [])
        if phase == "decode" and ids:
            self._tokens[name].add(tuple(ids))
        self.samples.append(labels | {"round": turn, "new_tokens": len(ids)} | run)
        say(f"{turn + 1}/{self._args.repeat}  {line(self.samples[-1])}")

    def _score(self) -> None:
        """Perplexity of every quantization. The same texts, and as many tokens of them, for all."""
        scored = [system for name, system in self._systems.items() if name in ("llama.cpp", "transformers")]
        packs = [Flashrt(self._args.flashrt, pack, Pack(pack).manifest.weights) for pack in self._args.packs]
        score = Score(TEXTS, SCORE_TOKENS, SCORE_WINDOW, self._threads)
        counts = set()
        for system in [*scored, *packs]:
            outputs = [output(command, self._threads) for command in system.score_commands(score)]
            found = system.perplexity(outputs, score)
            counts.add(tuple(text["tokens"] for text in found.values()))
            label = f"{system.name} {system.weights}"
            self.samples += [{"phase": "perplexity", "system": label, "text": t} | f for t, f in found.items()]
            say(f"{label}  {found}")
        if len(counts) > 1:
            raise SystemExit(f"the systems cut the texts into different numbers of tokens: {counts}")


def measure(system: System, job: Job) -> dict[str, Any]:
    """One run: what the system says, and what was seen from outside."""
    runs.drop_page_cache()
    read, began, limit = blocks_read(), time.perf_counter(), runs.limit_of(job.cap)
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


def line(sample: Sample) -> str:
    what = f"{sample['system']:12} {sample['cap']:>5} GiB  {sample['status']:8}"
    if "first_token_s" not in sample:
        return f"{what}  after {sample['wall_s']:.1f} s"
    peak = f"peak {sample['peak_rss_bytes'] / runs.GIB:.2f} GiB"
    if sample["decode_tok_per_s"] is None:
        return f"{what}  {sample['prefill_tok_per_s']:8.1f} prompt tokens/s  {peak}"
    read = f"{sample['bytes_read_per_token'] / 1e6:7.1f} MB/token"
    first = f"first after {sample['first_token_s']:.1f} s"
    return f"{what}  {sample['decode_tok_per_s']:8.3f} tokens/s  {read}  {first}  {peak}"


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


def cut(tokenizer: Tokenizer, text: str, tokens: int) -> str:
    """The shortest beginning of `text` that has this many tokens."""
    end = bisect.bisect_left(range(len(text)), tokens, key=lambda end: len(tokenizer.encode(text[:end])))
    if len(tokenizer.encode(text[:end])) != tokens:
        raise SystemExit(f"no beginning of the text has {tokens} tokens exactly: ask for another number")
    return text[:end]
