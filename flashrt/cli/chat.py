"""flashrt chat: a conversation in the model's own chat template."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashrt.cli import options
from flashrt.cli.chat_commands import HINT, parsed
from flashrt.cli.console import say, size, stdin
from flashrt.cli.conversation import Conversation
from flashrt.cli.lines import EDITING, streamed_messages, typed_messages
from flashrt.cli.run import check_argument, figures
from flashrt.config import Sampling
from flashrt.engine.options import LoadOptions
from flashrt.engine.recommended import recommended
from flashrt.errors import DiskError, SessionError, UsageError

if TYPE_CHECKING:
    from flashrt.engine.report import Report


def register(app: typer.Typer, name: str, guarded: Callable[..., Any]) -> None:
    app.command(name)(guarded(chat))


@options.loads(*options.LOAD)
def chat(
    pack: options.Model,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", show_default=False, help="A system message.")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            "-n",
            min=1,
            metavar="N",
            show_default=False,
            help="Longest answer. Omitted: to the end of the context.",
        ),
    ] = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    seed: options.Seed = None,
    stats: Annotated[
        bool,
        typer.Option("--stats", help="Print all figures after an answer; a terminal shows a short line."),
    ] = False,
    *,
    load: LoadOptions,
) -> None:
    """Talk to a model: one line, or what is pasted, is one message; without a terminal, the lines of stdin are.

    Three quotes begin and end a message of several lines. /help lists commands: /retry, /system, /save, /load, /reset,
    /exit. Ctrl-C stops an answer, twice it ends the chat. Sampling that is not given is what the model's authors
    recommend. What earlier messages computed is kept: only new text is read.

    Example: flashrt chat demo --budget-gb 1 --system "Answer in one sentence."
    """
    given = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "seed": seed,
    }
    options.sampling(**given)  # refuses bad values before anything is loaded
    check_argument(system, "--system")

    from flashrt.budget.plan import Workload
    from flashrt.cli import session

    typed = stdin().isatty()
    model = session.open_model(pack, load, EDITING if typed else ())
    template = model.tokenizer.chat_template
    template.check()
    choice = _sampling(given, model.tokenizer.text.generation)
    with session.load(model, Workload(model.context)) as engine:
        conversation = Conversation(engine, template, choice, system, max_new_tokens)
        conversation.resume(session.resume(engine, load.session, chat=True))
        if typed:
            say(f"{model.pack.manifest.name}, context {model.context} tokens. {HINT}")
        sequence, messages = engine.sequence, conversation.messages
        try:
            _converse(conversation, typed, stats)
        finally:  # also where Ctrl-C ends an answer before its message is taken in: it was read
            if engine.sequence is not sequence or conversation.messages is not messages:
                session.save(engine, load.session, conversation.messages)


def _converse(conversation: Conversation, typed: bool, stats: bool) -> None:
    """Raises the first error where nobody is there to read it and go on."""
    for message in typed_messages(HINT) if typed else streamed_messages():
        try:
            report = _respond(conversation, message)
        except EOFError:
            return
        except (UsageError, SessionError, DiskError) as error:
            if not typed:
                raise
            say(f"error: {error}")
            continue
        if report is not None and (stats or typed):
            say(figures(report) if stats else _status(conversation, report))


def _respond(conversation: Conversation, message: str) -> Report | None:
    """What a message asks for; the report of an answer. Raises EOFError for the command that ends a chat."""
    if not message.strip():
        return None
    if (found := parsed(message)) is not None:
        command, rest = found
        return command.run(conversation, rest)
    return conversation.answer(message.strip())


def _status(conversation: Conversation, report: Report) -> str:
    """How much of context and budget is used."""
    used, context = report.prompt_tokens + report.new_tokens, conversation.engine.plan.context
    speed = f"{report.decode_tok_per_s:.1f} tokens/s · " if report.decode_tok_per_s else ""
    peak = report.device_peak_bytes or report.peak_rss_bytes
    return f"[{speed}{used} of {context} tokens · memory {size(peak)} of {size(report.budget_bytes)}]"


def _sampling(given: dict[str, Any], generation: Mapping[str, Any]) -> Sampling:
    """The user's choice over the authors' recommendation. Raises PackError."""
    chosen = {name: value for name, value in given.items() if value is not None}
    return options.sampling(**(recommended(generation, chosen) | chosen))
