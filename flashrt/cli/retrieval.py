"""flashrt eval retrieval: whether a pack finds what a long prompt says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashrt.cli import options
from flashrt.cli.console import Progress, emit, show, size, table
from flashrt.engine.options import LoadOptions
from flashrt.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flashrt.calibration.retrieval import Answer, Pace

LOADED = tuple(name for name in options.LOAD if name not in ("context", "speculate", "draft", *options.SESSIONS))


@options.loads(*LOADED, speculate="off")
def retrieval(
    pack: options.Model,
    lengths: Annotated[
        str,
        typer.Option("--lengths", metavar="N,N", help="Tokens of a prompt, template and question included."),
    ] = "4096,8192",
    needles: Annotated[
        int, typer.Option("--needles", min=1, metavar="N", help="Questions about each haystack, at as many depths.")
    ] = 10,
    samples: Annotated[
        int, typer.Option("--samples", min=1, metavar="N", help="Haystacks of each task and length.")
    ] = 2,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="The same seed asks the same questions.")] = 0,
    *,
    load: LoadOptions,
    json: options.Json = False,
) -> None:
    """Ask for lines of long synthetic prompts: names with numbers, and hexadecimal keys with values.

    An answer is right if it matches exactly. It is greedy, in the model's chat template where there is one. Haystacks
    are prefilled as any prompt; questions and answers are computed in passes of at most 16 tokens.

    Example: flashrt eval retrieval demo --lengths 4096,8192 --needles 20 --budget-gb 2
    """
    from flashrt.budget.plan import Workload
    from flashrt.calibration.retrieval import ANSWER_TOKENS, Pace, Trial, answers
    from flashrt.cli import session
    from flashrt.config import checked_context
    from flashrt.machine.process import peak_resident_bytes
    from flashrt_kernels.limits import NARROW_TOKENS

    trial = Trial(parsed_lengths(lengths), needles, samples, seed)
    longest = max(trial.lengths)
    load = dataclasses.replace(load, context=longest + ANSWER_TOKENS)
    model = session.open_model(pack, load)
    context = checked_context(model.spec, load.context, longest)
    workload = Workload(context, prompt=longest, logit_rows=NARROW_TOKENS)
    pace, progress = Pace(), Progress("questions")
    with session.load(model, workload) as engine, progress:
        found = list(answers(engine, trial, pace, progress.of("retrieval")))
        result: dict[str, Any] = {
            "accuracy": accuracy(found),
            **_speeds(pace),
            "needles": needles,
            "samples": samples,
            "seed": seed,
            "options": _plain(load),
            "bytes_read": engine.bytes_read,
            "budget_bytes": engine.plan.budget_bytes,
            "peak_rss_bytes": peak_resident_bytes(),
            "device_peak_bytes": engine.runtime.peak_bytes(),
            "plan": engine.plan.to_json(),
            "answers": [dataclasses.asdict(answer) for answer in found],
        }
    if json:
        emit(result)
    else:
        show(_table(result["accuracy"]))
        print(_line(result, len(found)))


def parsed_lengths(text: str) -> list[int]:
    """Ascending lengths, each once. Raises UsageError for anything but whole numbers with commas between."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 10 and int(part) for part in parts):
        raise UsageError(f"--lengths is {text!r}, expected whole numbers of tokens with commas between: 4096,8192")
    return sorted({int(part) for part in parts})


def accuracy(found: Sequence[Answer]) -> dict[str, dict[str, float]]:
    """The share of right answers, by task and by length."""
    cells: dict[str, dict[str, list[bool]]] = {}
    for answer in found:
        cells.setdefault(answer.task, {}).setdefault(str(answer.length), []).append(answer.correct)
    return {
        task: {length: sum(right) / len(right) for length, right in by_length.items()}
        for task, by_length in cells.items()
    }


def _speeds(pace: Pace) -> dict[str, float | None]:
    return {
        "prefill_tok_per_s": pace.prefill_tokens / pace.prefill_s if pace.prefill_s else None,
        "decode_tok_per_s": pace.answer_tokens / pace.answer_s if pace.answer_s else None,
    }


def _plain(load: LoadOptions) -> dict[str, Any]:
    """Options as JSON can hold them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(load).items()}


def _table(shares: dict[str, dict[str, float]]) -> Any:
    result = table("prompt tokens", *shares)
    for length in next(iter(shares.values())):
        result.add_row(length, *(f"{by_length[length]:.1%}" for by_length in shares.values()))
    return result


def _line(result: dict[str, Any], questions: int) -> str:
    speeds = [
        f"{what} {result[name]:.1f} tokens/s"
        for what, name in (("prefill", "prefill_tok_per_s"), ("answers", "decode_tok_per_s"))
        if result[name]
    ]
    peak = result["device_peak_bytes"] or result["peak_rss_bytes"]
    used = f"peak memory {size(peak)} of {size(result['budget_bytes'])}"
    return ", ".join([f"{questions} questions, seed {result['seed']}", *speeds, used])
