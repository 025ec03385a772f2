#!/usr/bin/env python3
"""What sparse attention costs at a long context, beside exact attention and other ways to choose as many tokens.

    python -m tools.research.sparse_attention perplexity PACK --text-file FILE [--text-file FILE] \\
        --out docs/benchmarks/sparse-kv-perplexity-NAME.json
    python -m tools.research.sparse_attention retrieval PACK --lengths 4096 8192 --needles 50 --samples 2

The pack has labels (`flashrt calibrate PACK --kv`). One engine does it all: a text, or a haystack, is prefilled once,
exactly as any prompt, and what follows is computed as decoding computes it, for one way after the other. A way is what
chooses and the share kept; `exact` attends to everything. See tools.research.selectors for what else may choose.

perplexity  of what follows the first --prompt tokens of each text, up to --window; the error is the standard error of
            the mean difference of log-probabilities from exact attention's, over all tokens
retrieval   questions of `flashrt eval retrieval`. An answer is verified as a draft: it is right if it is the greedy
            one. Intervals are Wilson's, of 95%; `lost` and `won` count questions that only exact attention, or only the
            way, answered rightly
"""

from __future__ import annotations

import argparse
import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flashrt.budget.plan import Workload
from flashrt.calibration.haystack import Frame, Haystack, Needle
from flashrt.calibration.kv_losses import Dial, after_prompt, dialled
from flashrt.calibration.retrieval import ANSWER_TOKENS, Pace, Trial, ask
from flashrt.engine.engine import Engine
from flashrt.engine.loaded_pack import LoadedPack
from flashrt.engine.options import LoadOptions
from flashrt.engine.runtime import runtime_for
from flashrt.labels import share_of
from flashrt.model.scores import Scores
from flashrt.storage.kv_labels import read_labels
from flashrt.storage.pack import Pack
from flashrt_kernels.limits import NARROW_TOKENS
from tools.benchmarks.harness import facts
from tools.benchmarks.harness.record import Benchmark, say
from tools.benchmarks.harness.samples import Sample, grouped, only, table
from tools.research.selectors import choose_by

Array = np.ndarray
Way = tuple[str, str]  # what chooses, and the share kept

EXACT: Way = ("labels", "1")
KEEPS = ("1/4", "1/8", "1/16")
CERTAIN = 1.96  # standard errors to both sides


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = Benchmark("tools.research.sparse_attention", __doc__)
    parser = benchmark.parser
    parser.add_argument("what", choices=("perplexity", "retrieval"))
    parser.add_argument("pack", type=Path)
    parser.add_argument("--text-file", type=Path, action="append", default=[])
    parser.add_argument("--window", type=int, default=8192, help="tokens of a text")
    parser.add_argument("--prompt", type=int, default=6144, help="of these, tokens that are prefilled")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--needles", type=int, default=50)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--ways", type=way, nargs="+", default=[("labels", k) for k in KEEPS], help="such as bounds=1/16"
    )
    parser.add_argument("--budget", type=float, help="GiB")
    parser.add_argument("--threads", type=int)
    args = benchmark.parse(arguments)
    measure, summary = (perplexity, of_texts) if args.what == "perplexity" else (retrieval, of_questions)
    samples = list(measure(args))
    parameters = {**facts.pack(args.pack), **_public(args)}
    parameters["losses"] = dict(read_labels(Pack(args.pack)).losses)
    benchmark.publish(parameters, samples, summary(samples))


def perplexity(args: argparse.Namespace) -> Iterator[Sample]:
    """A sample for each text and way."""
    dial = Dial()
    with loaded(args, dial, args.window, scoring=True) as engine:
        prefix = engine.tokenizer.encode("")
        for path in args.text_file:
            text = path.read_text(encoding="utf-8")
            ids = [*prefix, *engine.tokenizer.encode(text, special=False)][: args.window]
            if len(ids) < args.window:
                raise SystemExit(f"{path} has {len(ids)} tokens, a window takes {args.window}")
            about = {"text": path.name, "sha256": hashlib.sha256(text.encode()).hexdigest()[:16]}
            exact = None
            for way in (EXACT, *args.ways):
                turn(engine, dial, way)
                found = log_probabilities(engine, ids, args.prompt)
                exact = found if exact is None else exact
                sample = about | {"choose": way[0], "keep": way[1], "tokens": len(found)} | compared(found, exact)
                say(str(sample))
                yield sample


def log_probabilities(engine: Engine, ids: Sequence[int], prompt: int) -> Array:
    """Of each token behind the first `prompt` and one, float64, in nats."""
    decoder, found = engine.runner.decoder, list[Array]()
    scores = decoder.scores

    def noted(*arguments: Any) -> Scores:
        result = scores(*arguments)
        found.append(result.values)
        return result

    decoder.scores = noted  # type: ignore[method-assign]
    try:
        after_prompt(engine, ids, prompt)
    finally:
        decoder.scores = scores  # type: ignore[method-assign]
    return np.concatenate(found)


def compared(found: Array, exact: Array) -> dict[str, float]:
    """Perplexity, its rise over exact attention's, and the standard error of that."""
    worse = exact - found
    return {
        "ppl": math.exp(-found.mean()),
        "rise": math.expm1(worse.mean()),
        "error": float(worse.std(ddof=1) / math.sqrt(len(worse))),
        "nats": float(found.sum()),
        "square": float((worse**2).sum()),
    }


def retrieval(args: argparse.Namespace) -> Iterator[Sample]:
    """A sample for each haystack and way, with which of its questions were answered rightly."""
    dial = Dial()
    trial = Trial(args.lengths, args.needles, args.samples, args.seed)
    with loaded(args, dial, max(args.lengths) + ANSWER_TOKENS, logit_rows=NARROW_TOKENS) as engine:
        for haystack in trial.haystacks(Frame.of(engine.tokenizer)):
            engine.sequence.rewind(0)
            for way in (EXACT, *args.ways):
                turn(engine, dial, way)
                right = [int(answers_rightly(engine, haystack, needle)) for needle in haystack.needles]
                about = {"task": haystack.form.name, "length": haystack.length, "choose": way[0], "keep": way[1]}
                sample = about | {"right": sum(right), "questions": len(right), "answers": right}
                say(str(sample))
                yield sample


def answers_rightly(engine: Engine, haystack: Haystack, needle: Needle) -> bool:
    """Whether the greedy answer is the one expected: its tokens are verified as a draft, in one pass.

    Where they are not those of the greedy answer, other tokens may still have the same text: then it is generated.
    """
    runner, sequence, own = engine.runner, engine.sequence, haystack.ids
    if sequence.rewind(min(sequence.length, len(own))) < len(own):
        runner.prefill(sequence, own)
    for begin in range(0, len(needle.question), NARROW_TOKENS):
        logits = runner.step_batch(sequence, needle.question[begin : begin + NARROW_TOKENS])[-1]
    expected = needle.answer + haystack.form.closing
    choices, ids = [int(logits.argmax())], engine.tokenizer.encode(expected, special=False)
    for begin in range(0, len(ids), NARROW_TOKENS):
        choices += map(int, runner.step_batch(sequence, ids[begin : begin + NARROW_TOKENS]).argmax(axis=-1))
    agreed = next((i for i, token in enumerate(ids) if choices[i] != token), len(ids))
    said = engine.tokenizer.decode([*ids[:agreed], choices[agreed]])
    if agreed == len(ids) or said.partition(haystack.form.closing)[0] == needle.answer:
        return True
    return expected.startswith(said) and ask(engine, haystack, needle, Pace()) == needle.answer


def way(word: str) -> Way:
    """Of labels=1/16. Raises ValueError."""
    choose, _, keep = word.partition("=")
    if choose not in ("labels", "recent", "bounds", "keys"):
        raise ValueError(word)
    share_of(keep)
    return choose, keep


def loaded(args: argparse.Namespace, dial: Dial, context: int, **workload: Any) -> Engine:
    """An engine that chooses as `dial` says."""
    pack = Pack(args.pack)
    options = LoadOptions(context=context, speculate="off", budget_gb=args.budget)
    model = LoadedPack(pack, options, runtime_for("cpu", args.threads), kv=dialled(read_labels(pack), dial))
    return model.load(Workload(context, prompt=context, **workload))


def turn(engine: Engine, dial: Dial, way: Way) -> None:
    choose_by(engine, way[0])
    dial.keep = share_of(way[1])


def of_texts(samples: list[Sample]) -> dict[str, Any]:
    """A row for each way: the rise on each text, and on all of them together."""
    texts = [text for (text,) in grouped(samples, "text")]
    rows = []
    for (choose, keep), group in grouped(samples, "choose", "keep").items():
        exact = only(samples, choose=EXACT[0], keep=EXACT[1])
        tokens = sum(sample["tokens"] for sample in group)
        mean = sum(e["nats"] - s["nats"] for e, s in zip(exact, group, strict=True)) / tokens
        variance = max(sum(sample["square"] for sample in group) / tokens - mean**2, 0.0)
        rises = [figure for sample in group for figure in (sample["ppl"], sample["rise"])]
        rows.append([choose, keep, *rises, math.expm1(mean), math.sqrt(variance / tokens)])
    columns = ["chosen by", "kept", *(c for text in texts for c in ((text, "ppl"), ("over exact", "change")))]
    return {"tables": [table([*columns, ("all texts", "change"), ("standard error", "change")], rows)]}


def of_questions(samples: list[Sample]) -> dict[str, Any]:
    """A row for each length and way."""
    rows = []
    for (length, choose, keep), group in grouped(samples, "length", "choose", "keep").items():
        exact = only(samples, length=length, choose=EXACT[0], keep=EXACT[1])
        ours, theirs = (np.concatenate([sample["answers"] for sample in part]) for part in (group, exact))
        low, high = wilson(int(ours.sum()), len(ours))
        by_task = [sum(s["right"] for s in own) / sum(s["questions"] for s in own) for own in _by_task(group)]
        paired = [int((theirs > ours).sum()), int((ours > theirs).sum())]
        rows.append([length, choose, keep, len(ours), float(ours.mean()), low, high, *by_task, *paired])
    tasks = [(task, "share") for (task,) in grouped(samples, "task")]
    interval = [("right", "share"), ("at least", "share"), ("at most", "share")]
    return {"tables": [table(["tokens", "chosen by", "kept", "questions", *interval, *tasks, "lost", "won"], rows)]}


def wilson(right: int, count: int) -> tuple[float, float]:
    """The interval that a share lies in, by Wilson's score."""
    share, z = right / count, CERTAIN
    middle, width = share + z**2 / (2 * count), z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return (middle - width) / (1 + z**2 / count), (middle + width) / (1 + z**2 / count)


def _by_task(group: list[Sample]) -> list[list[Sample]]:
    return list(grouped(group, "task").values())


def _public(args: argparse.Namespace) -> dict[str, Any]:
    common = {"ways": ["=".join(way) for way in args.ways]}
    if args.what == "perplexity":
        return common | {"texts": [path.name for path in args.text_file], "window": args.window, "prompt": args.prompt}
    return common | {name: getattr(args, name) for name in ("lengths", "needles", "samples", "seed")}


if __name__ == "__main__":
    main()
