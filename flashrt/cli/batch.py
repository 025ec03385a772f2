"""flashrt batch: answer the requests of a file together."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashrt.cli import options
from flashrt.cli.console import INTERVAL_S, Progress, duration, emit, say, size
from flashrt.engine.options import LoadOptions
from flashrt.errors import UsageError

if TYPE_CHECKING:
    from flashrt.batch.item import Item
    from flashrt.batch.output import Output
    from flashrt.batch.run import State
    from flashrt.budget.plan import Workload
    from flashrt.engine.batcher import Batcher
    from flashrt.engine.loaded_pack import LoadedPack
    from flashrt.engine.sequences import Demand

DEFAULT_NEW_TOKENS = 256
CONTEXT_STEP = 16  # positions: whole pages of memory


def register(app: typer.Typer, name: str, guarded: Callable[..., Any]) -> None:
    app.command(name)(guarded(batch))


@options.loads(
    "budget_gb",
    "context",
    "rope_scaling",
    "experts_used",
    "dtype",
    "kv_dtype",
    "threads",
    "cache_dir",
    speculate="off",
)
def batch(
    pack: options.Model,
    requests: Annotated[
        Path, typer.Argument(metavar="IN", show_default=False, help="Requests: .jsonl, or prompts, one a line.")
    ],
    answers: Annotated[
        Path,
        typer.Argument(metavar="OUT", show_default=False, help="Where answers go; what it has is not computed again."),
    ],
    sequences: options.Sequences = None,
    name: Annotated[
        list[str] | None,
        typer.Option(
            "--name", metavar="NAME", show_default=False, help="Answer to this model name too; may be repeated."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int,
        typer.Option("--max-new-tokens", "-n", min=1, metavar="N", help="Of a prompt: tokens of its answer, at most."),
    ] = DEFAULT_NEW_TOKENS,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            show_default=False,
            help="Ask each prompt as one message, in the model's chat template, or continue it as text. "
            "Omitted: ask, where the model has a template.",
        ),
    ] = None,
    *,
    load: LoadOptions,
    json: options.Json = False,
) -> None:
    """Answer the requests of a file together: more tokens per second than one after the other, the same texts.

    IN.jsonl is in OpenAI's batch format: custom_id, method, url (/v1/chat/completions or /v1/completions) and body.
    Any other file holds prompts, one a line, which are answered greedily, as `flashrt run` does. Each line of OUT is an
    answer, or an error in its place, in the order in which they are there. A run that was ended goes on where it was.

    Example: flashrt batch demo IN.jsonl OUT.jsonl --budget-gb 1
    """
    try:
        import msgspec  # noqa: F401 - what requests are read with
    except ImportError:
        raise UsageError("flashrt batch needs msgspec: install flashrt[serve]") from None
    from flashrt.batch.lines import JSON_SUFFIX, longest_line
    from flashrt.batch.output import Output
    from flashrt.cli import session

    if requests.resolve() == answers.resolve():
        raise UsageError(f"{answers} holds the requests: name another file for the answers")
    body = None if requests.suffix == JSON_SUFFIX else _prompt_body(max_new_tokens, chat)
    with Output(answers) as output:
        model = session.open_model(pack, load)
        items, done = _read(model, requests, output, tuple(name or ()), body, longest_line(model.context))
        _answer(model, items, output, sequences, json, done)


def _prompt_body(max_new_tokens: int, chat: bool | None) -> tuple[dict[str, Any], bool | None]:
    return {"max_tokens": max_new_tokens, "temperature": 0}, chat


def _read(
    model: LoadedPack,
    path: Path,
    output: Output,
    names: tuple[str, ...],
    body: tuple[dict[str, Any], bool | None] | None,
    longest: int,
) -> tuple[list[Item], int]:
    """What is still to be answered, and how many lines are; errors are written. Raises UsageError."""
    from flashrt.batch.item import Reader, identity
    from flashrt.batch.lines import lines
    from flashrt.server.desk import desk_of

    reader, items, done = Reader(desk_of(model), names), [], dict(output.done)
    for line in lines(path, longest):
        if (known := done.pop(line.number, None)) is not None:
            if known != identity(line):
                raise UsageError(
                    f"{output.path} answers another line {line.number} than {path} has: name another file for answers"
                )
            reader.known(line)
            continue
        item = reader.request(line) if body is None else reader.prompt(line, *body)
        if item.error is None:
            items.append(item)
        else:
            output.write([item.failure(item.error)])
            say(f"line {line.number}: {item.error.message}")
    if done:
        raise UsageError(f"{output.path} answers line {min(done)}, which {path} has not: name another file for answers")
    return items, len(output.done)


def _answer(model: LoadedPack, items: list[Item], output: Output, asked: int | None, json: bool, done: int) -> None:
    from flashrt.batch.run import Run, State
    from flashrt.engine.batcher import Batcher
    from flashrt.engine.sequences import choose

    if done:
        say(f"{done} lines were answered before")
    state, figures, began = State(0, 0), {}, time.monotonic()
    if items:
        choice = choose(model, *_demand(model, items), asked)
        say(choice.why)
        with Progress() as progress:
            engine = model.engine(choice.best.plan, progress.of("loading"))
        with engine:
            batcher = Batcher(engine)
            began = time.monotonic()
            state = Run(batcher, model.spec.eos, output, _Show(began)).answer(items)
            figures = _figures(batcher, state, time.monotonic() - began)
    else:
        say("there is nothing left to answer")
    if json:
        emit(figures | {"answered": state.answered, "answered_before": done})
    elif figures:
        say(_closing(figures))


def _demand(model: LoadedPack, items: list[Item]) -> tuple[Workload, Demand]:
    """What is planned for, and what there is to compute."""
    from flashrt.budget.plan import Workload
    from flashrt.engine.sequences import Demand
    from flashrt.server.memory import result_bytes
    from flashrt.spec import full_ropes

    parts = [(part, item.asked.rules.top_logprobs) for item in items if item.asked for part in item.asked.parts]
    prompts, limits = [len(part.prompt) for part, _ in parts], [part.limit for part, _ in parts]
    longest = max(prompt + max(limit, 1) for prompt, limit in zip(prompts, limits, strict=True))
    needed = -(-longest // CONTEXT_STEP) * CONTEXT_STEP
    if any(rope.variant(needed) != rope.variant(model.context) for rope in full_ropes(model.spec.layers)):
        needed = model.context  # by which positions are scaled: a text must not depend on the others
    answer_bytes = max(result_bytes([part], top) for part, top in parts)
    demand = Demand(len(parts), sum(prompts), sum(limits), max(limits), answer_bytes)
    return Workload(needed, prompt=max(prompts)), demand


class _Show:
    """Says how far a run is, every few seconds."""

    def __init__(self, began: float) -> None:
        self._began = self._said = began

    def __call__(self, state: State) -> None:
        now = time.monotonic()
        if now - self._said < INTERVAL_S:
            return
        self._said = now
        seconds, spent = now - self._began, state.tokens - state.left
        left = f", {duration(seconds * state.left / spent)} left" if spent else ""
        say(f"{state.answered} of {state.requests} requests, {state.came / seconds:.1f} tokens/s{left}")


def _figures(batcher: Batcher, state: State, seconds: float) -> dict[str, Any]:
    from flashrt.machine.process import peak_resident_bytes

    work = batcher.work
    return {
        "requests": state.requests,
        "tokens": state.came,
        "prompt_tokens": work.prompt_tokens,
        "copied_tokens": work.copied_tokens,
        "sequences": batcher.places,
        "passes": work.passes,
        "rows_per_pass": work.rows / max(work.passes, 1),
        "seconds": seconds,
        "tok_per_s": state.came / seconds,
        "peak_rss_bytes": peak_resident_bytes(),
    }


def _closing(figures: dict[str, Any]) -> str:
    return (
        f"[{figures['requests']} requests, {figures['tokens']} tokens, {figures['tok_per_s']:.1f} tokens/s · "
        f"{figures['sequences']} at a time, {figures['rows_per_pass']:.1f} rows per pass · "
        f"peak memory {size(figures['peak_rss_bytes'])}]"
    )
