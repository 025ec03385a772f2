#!/usr/bin/env python3
"""What drafting brings: speed with and without it under several budgets, and what each of its parts brings.

    python -m tools.benchmarks.speculation PACK --budgets 0.65 0.8 1 --out docs/benchmarks/speculation-NAME.json
    python -m tools.benchmarks.speculation PACK --ablation --out docs/benchmarks/speculation-parts-NAME.json
    python -m tools.benchmarks.speculation PACK --budgets 1.5 --behind tools/texts/long/cpp.txt \
        --load=--kv=sparse --load=--kv-keep=1/16 --out docs/benchmarks/speculation-sparse-kv-NAME.json

Questions of `tools.benchmarks.prompts` are answered greedily, in the model's chat template, up to the end of the answer
or --tokens. Who goes first changes from question to question, and all must write the same text. Without --ablation
every answer is a fresh process inside a memory cgroup of exactly its budget ('none': no limit), with `--speculate off`
and `auto`. --disk-gb-per-s slows a fast disk down: what drafting gains depends on the disk. With --behind a question
stands behind a long text, which is prefilled once for each budget: runs find it on disk again. With --ablation the
variants answer in one process, which is not confined:

    off       no drafts
    lookup    drafts from the text alone
    static    resident neurons as they are after loading, no lookup
    adaptive  resident neurons follow the text, no lookup
    chain     the same, with the draft's own choices only: no second choices beside them
    all       what a run does
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from flashrt.storage.pack import Pack
from tools.benchmarks.harness import facts, runs
from tools.benchmarks.harness.disk import disk_label, disk_option, plain_rates, slow_disk
from tools.benchmarks.harness.record import Benchmark
from tools.benchmarks.harness.samples import Sample, grouped, in_turn, median, only, ratios, spread, table, tabulated
from tools.benchmarks.prompts import SETS

MODES = ("off", "auto")
FIGURES = (
    "decode_tok_per_s", "tokens_per_pass", "positions_per_pass", "draft_s", "verify_s", "bytes_read_per_token",
    "peak_rss_bytes", "acceptance", "new_tokens", "finish_reason",
)  # fmt: skip
PARTS = {
    "tokens_per_pass": ("tokens per pass", "number"),
    "positions_per_pass": ("positions", "number"),
    "decode_tok_per_s": ("tokens/s", "number"),
}
DEPTHS = 4  # of which the page says how often a draft stands
RESIDENT, MODEL, DRAFTERS = "flashrt.cache.adaptive", "flashrt.speculate.model", "flashrt.engine.drafters"


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = Benchmark("tools.benchmarks.speculation", __doc__)
    parser = benchmark.parser
    parser.add_argument("pack", type=Path)
    parser.add_argument("--budgets", nargs="+", default=["0.8"], metavar="GIB")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--count", type=int, default=10, help="questions of each set")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer, at most")
    parser.add_argument("--behind", type=Path, help="a text that all questions stand behind")
    parser.add_argument(
        "--load", action="append", default=[], metavar="OPTION", help="of `flashrt run`, such as --kv=sparse"
    )
    parser.add_argument("--ablation", action="store_true", help="what the parts bring")
    disk_option(parser)
    args = benchmark.parse(arguments)
    with slow_disk(args.pack, args.disk_gb_per_s):
        rates = plain_rates(Pack(args.pack).largest_file)
        samples = [s for budget in args.budgets for kind in args.sets for s in answers(args, budget, kind)]
    shape = {name: getattr(args, name) for name in ("tokens", "count", "load", "ablation", "disk_gb_per_s")}
    shape["behind"] = args.behind and args.behind.name
    parameters = facts.pack(args.pack) | shape | rates
    benchmark.publish(parameters, samples, summary(args, parameters, samples))


def answers(args: argparse.Namespace, budget: str, kind: str) -> list[Sample]:
    """The answers of every mode or variant to the questions of one kind."""
    questions = SETS[kind][: args.count]
    if args.ablation:
        found = runs.in_child(variants, args.pack, budget, questions, args.tokens)
    else:
        before = "" if args.behind is None else args.behind.read_text("utf-8") + "\n\n"
        with tempfile.TemporaryDirectory() as sessions:
            kept = ["--session-dir", sessions, "--session-gb", "4"] if before else []
            run = partial(answer, args.pack, budget, args.tokens, [*args.load, *kept])
            found = compare(run, MODES, [before + question for question in questions])
    return [{"budget": budget, "kind": kind} | sample for sample in found]


def compare(run: Any, modes: Sequence[str], questions: Sequence[Any]) -> list[Sample]:
    """The figures of `run(question, mode)`. Raises SystemExit where modes write different texts."""
    samples = []
    for number, question in enumerate(questions):
        texts = set()
        for mode in in_turn(modes, number):
            report = run(question, mode)
            texts.add(report["text"])
            samples.append({"question": number, "mode": mode} | {name: report[name] for name in FIGURES})
        if len(texts) != 1:
            raise SystemExit(f"question {number} was answered with different texts by {', '.join(modes)}")
    return samples


def answer(pack: Path, budget: str, tokens: int, load: list[str], question: str, mode: str) -> dict[str, Any]:
    """One run's report. It ends where the answer does: what a model writes after it is not text to judge drafts by."""
    options = ["--prompt", question, "--max-new-tokens", str(tokens), "--speculate", mode]
    return runs.flashrt_run(pack, budget, *load, *options)


def summary(args: argparse.Namespace, parameters: dict[str, Any], samples: list[Sample]) -> dict[str, Any]:
    text = (
        f"{parameters['model']}, {parameters['dtype']}: greedy answers of at most {args.tokens} tokens, the same text "
        f"from all. {disk_label(args.disk_gb_per_s, parameters)}"
    )
    if args.behind:
        text += (
            f" Every question stands behind {args.behind.name}; flashrt ran with {' '.join(args.load) or 'no option'}."
        )
    if args.ablation:
        labels = {"budget": ("budget", "budget"), "kind": "questions", "mode": "drafts"}
        ordered = sorted(samples, key=lambda s: (args.budgets.index(s["budget"]), list(VARIANTS).index(s["mode"])))
        ordered = [s for kind in args.sets for s in only(ordered, kind=kind)]
        return {"text": [text], "tables": [tabulated(ordered, labels, PARTS)]}
    columns = [
        ("budget", "budget"), "questions", ("tokens/s, off", "number"), ("auto", "number"), ("ratio", "ratio"),
        ("tokens per pass", "number"), ("positions", "number"), "drafts stand, by depth",
    ]  # fmt: skip
    return {"text": [text], "tables": [table(columns, map(row, grouped(samples, "budget", "kind").values()))]}


def row(samples: list[Sample]) -> list[Any]:
    """With and without drafts, of one budget and kind."""
    off, auto = (only(samples, mode=mode) for mode in MODES)
    stood = ", ".join(f"{share:.0%}" for share in acceptance(auto)[:DEPTHS])
    return [
        samples[0]["budget"],
        f"{len(off)} {samples[0]['kind']}",
        *(spread(s["decode_tok_per_s"] for s in mode) for mode in (off, auto)),
        spread(ratios(auto, off, "decode_tok_per_s", "question")),
        *(median(s[name] for s in auto) for name in ("tokens_per_pass", "positions_per_pass")),
        stood,
    ]


def acceptance(samples: list[Sample]) -> list[float]:
    """By depth, averaged over the answers that drafted so far."""
    found: list[list[float]] = []
    for sample in samples:
        for depth, share in enumerate(sample["acceptance"] or []):
            found += [[]] if depth == len(found) else []
            found[depth].append(share)
    return [statistics.mean(shares) for shares in found]


def variants(pack: Path, budget: str, questions: Sequence[str], tokens: int) -> list[Sample]:
    """The answers of every variant, in this process."""
    from flashrt.budget.plan import Workload
    from flashrt.engine.loaded_pack import AUTO_DRAFT_TOKENS
    from flashrt.engine.open import open_model
    from flashrt.engine.options import LoadOptions

    model = open_model(pack, LoadOptions(budget_gb=runs.gib_of(budget), speculate=AUTO_DRAFT_TOKENS))
    template = model.tokenizer.chat_template
    prompts = [
        model.tokenizer.encode(template.render([{"role": "user", "content": question}]), special=False)
        for question in questions
    ]
    longest = max(map(len, prompts))
    plan = model.plan(Workload(longest + tokens, prompt=longest))

    def run(prompt: list[int], name: str) -> dict[str, Any]:
        with patched(VARIANTS[name]), model.engine(plan) as engine:
            generation = engine.generate(prompt, tokens)
            for _ in generation:
                pass
            return generation.report.to_json()

    return compare(run, tuple(VARIANTS), prompts)


VARIANTS: dict[str, dict[str, Any]] = {
    "off": {"flashrt.engine.generation.drafters_of": lambda *_: []},
    "static": {f"{DRAFTERS}.Lookup": None, f"{RESIDENT}.SWAP_MARGIN": float("inf")},
    "lookup": {f"{DRAFTERS}.ModelDrafter": None},
    "adaptive": {f"{DRAFTERS}.Lookup": None},
    "chain": {f"{MODEL}.WIDTH": 1},
    "all": {},
}


class Silent:
    """A drafter that never proposes anything."""

    name = "silent"

    def __init__(self, *arguments: Any) -> None:
        pass

    def accept(self, tokens: Any) -> None:
        pass

    def propose(self) -> Iterator[list[Any]]:
        return iter(())


@contextlib.contextmanager
def patched(patches: dict[str, Any]) -> Iterator[None]:
    with contextlib.ExitStack() as all_of_them:
        for name, value in patches.items():
            all_of_them.enter_context(mock.patch(name, Silent if value is None else value))
        yield


if __name__ == "__main__":
    main()
