"""The systems that are compared: how each is started, and where its figures are found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tools.benchmarks.harness.runs import last_json

RUNNERS = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Job:
    """What one process is to do. `warm`: time the prompt on weights that are in memory already."""

    prompt: Path
    prompt_tokens: int
    tokens: int
    cap: str  # GiB, or none
    threads: int
    seconds: float
    warm: bool = False


@dataclass(frozen=True, slots=True)
class Score:
    """Texts whose perplexity is wanted."""

    texts: list[Path]
    tokens: int
    window: int
    threads: int


class System(Protocol):
    """A program that generates. `weights` says in which form it holds them."""

    @property
    def name(self) -> str: ...

    @property
    def weights(self) -> str: ...

    @property
    def program(self) -> Path: ...

    def command(self, job: Job) -> list[str]: ...

    def figures(self, stdout: str, wall_s: float) -> dict[str, Any]:
        """What a finished process said of itself, under the names that `measure` gives them."""
        ...

    def score_commands(self, score: Score) -> list[list[str]]: ...

    def perplexity(self, stdouts: list[str], score: Score) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Flashrt:
    """The installed program."""

    program: Path
    pack: Path
    weights: str
    name: str = "flashrt"

    def command(self, job: Job) -> list[str]:
        command = [str(self.program), "run", str(self.pack), "--json", "--raw", "--ignore-eos"]
        command += ["--prompt-file", str(job.prompt), "--max-new-tokens", str(job.tokens)]
        command += ["--threads", str(job.threads), "--speculate", "off"]
        return command if job.cap == "none" else [*command, "--budget-gb", job.cap]

    def figures(self, stdout: str, wall_s: float) -> dict[str, Any]:
        """Seen from outside, the first token comes when all is over but decoding. Leaving counts against flashrt."""
        report = last_json(stdout)
        first = wall_s - report["decode_s"]
        return {
            "prompt_tokens": report["prompt_tokens"],
            "token_ids": report["token_ids"],
            "load_s": first - report["ttft_s"],
            "first_token_s": first,
            "prefill_s": report["ttft_s"],
            "decode_tok_per_s": report["decode_tok_per_s"],
            "bytes_read_per_token": report["bytes_read_per_token"],
        }

    def score_commands(self, score: Score) -> list[list[str]]:
        command = [str(self.program), "eval", "ppl", str(self.pack), "--json", "--ctx", str(score.window)]
        command += ["--max-tokens", str(score.tokens), "--threads", str(score.threads)]
        return [[*command, "--text-file", str(text)] for text in score.texts]

    def perplexity(self, stdouts: list[str], score: Score) -> dict[str, Any]:
        reports = [last_json(stdout) for stdout in stdouts]
        return {
            text.name: {"ppl": report["ppl"], "tokens": report["tokens"]}
            for text, report in zip(score.texts, reports, strict=True)
        }


@dataclass(frozen=True, slots=True)
class Peer:
    """A runner of this folder, in an environment of its own."""

    name: str
    program: Path
    runner: Path
    model: Path
    weights: str
    scratch: Path | None = None
    options: tuple[str, ...] = ()

    def command(self, job: Job) -> list[str]:
        command = [*self._start(job.threads), "--prompt-file", str(job.prompt), "--tokens", str(job.tokens)]
        command += ["--context", str(job.prompt_tokens + job.tokens), "--seconds", str(job.seconds)]
        if self.scratch:
            command += ["--scratch", str(self.scratch)]
        return [*command, "--warm"] if job.warm else command

    def figures(self, stdout: str, wall_s: float) -> dict[str, Any]:
        return last_json(stdout)

    def score_commands(self, score: Score) -> list[list[str]]:
        command = [*self._start(score.threads), "--context", str(score.window), "--score-tokens", str(score.tokens)]
        return [[*command, "--score", *map(str, score.texts)]]

    def perplexity(self, stdouts: list[str], score: Score) -> dict[str, Any]:
        return dict(last_json(stdouts[0])["perplexity"])

    def _start(self, threads: int) -> list[str]:
        command = [str(self.program), str(self.runner), "--model", str(self.model), "--threads", str(threads)]
        return [*command, *self.options]


def peers(environments: Path, gguf: Path, checkpoint: Path, scratch: Path) -> dict[str, Peer]:
    """The peers by name. `environments` holds what `make peers` made."""

    def python(environment: str) -> Path:
        return environments / environment / "bin" / "python"

    llama, transformers = python("llama.cpp"), python("transformers")
    llama_runner, quantization = RUNNERS / "run_llama_cpp.py", gguf.stem.rpartition("-")[2].upper()
    found = [
        Peer("llama.cpp", llama, llama_runner, gguf, quantization),
        Peer("llama.cpp --no-repack", llama, llama_runner, gguf, quantization, options=("--no-repack",)),
        Peer("transformers", transformers, RUNNERS / "run_transformers.py", checkpoint, "bf16"),
        Peer("accelerate", transformers, RUNNERS / "run_accelerate.py", checkpoint, "bf16", scratch / "accelerate"),
        Peer("AirLLM", python("airllm"), RUNNERS / "run_airllm.py", checkpoint, "bf16", scratch / "airllm"),
    ]
    return {peer.name: peer for peer in found}
