"""flashrt chat: a conversation in the model's own chat template."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashrt.cli import options
from flashrt.cli.console import say, stdin, write
from flashrt.cli.run import check_argument, figures
from flashrt.config import Sampling
from flashrt.engine.options import LoadOptions
from flashrt.engine.recommended import recommended
from flashrt.errors import UsageError
from flashrt.text.conversation import encode_conversation

if TYPE_CHECKING:
    from flashrt.engine.engine import Engine
    from flashrt.storage.session_file import Messages
    from flashrt.text.template import ChatTemplate
    from flashrt.text.tokenizer import Tokenizer

HELP = "/reset starts over, /exit (or end of input) ends the chat, Ctrl-C stops an answer"
EDITING = ("readline",)  # once imported, it gives input() its line editing


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
    stats: Annotated[bool, typer.Option("--stats", help="Print a line of figures after every answer.")] = False,
    *,
    load: LoadOptions,
) -> None:
    """Talk to a model: one line is one message; without a terminal, the lines of stdin are.

    Sampling that is not given is what the model's authors recommend. /reset starts over, /exit ends the chat,
    Ctrl-C stops an answer, twice it ends the chat. What earlier messages computed is kept: only new text is read.

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
            say(f"{model.pack.manifest.name}, context {model.context} tokens. {HELP}")
        sequence, messages = engine.sequence, conversation.messages
        try:
            _converse(conversation, stats)
        finally:  # also where Ctrl-C ends an answer before its message is taken in: it was read
            if engine.sequence is not sequence or conversation.messages is not messages:
                session.save(engine, load.session, conversation.messages)


@dataclass
class Conversation:
    """Messages so far, and the engine that answers them."""

    engine: Engine
    template: ChatTemplate
    sampling: Sampling
    system: str | None
    max_new_tokens: int | None
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def resume(self, messages: Messages | None) -> None:
        """Go on with the messages of a session; nothing for None. Raises UsageError where they had another system."""
        if not messages:
            return
        system = messages[0]["content"] if messages[0]["role"] == "system" else None
        if self.system not in (None, system):
            raise UsageError("the session began with another system message: leave --system out, or name another file")
        self.system, self.messages = system, [dict(message) for message in messages]

    def answer(self, text: str) -> str:
        """Answer one message, printing the answer as it comes; return its line of figures.

        Raises UsageError, and forgets the message, when it does not fit in what is left of the context.
        """
        tokenizer: Tokenizer = self.engine.tokenizer
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = encode_conversation(tokenizer, self.template, messages)
        room = self.engine.plan.context - len(ids)
        if room < 1:
            raise UsageError(
                f"the conversation has {len(ids)} tokens, the context is {self.engine.plan.context}: "
                "start over with /reset, or use a larger --context"
            )
        limit = min(self.max_new_tokens or room, room)
        generation = self.engine.generate(ids, limit, self.sampling, reuse=True)
        with _Interrupt() as interrupt:
            for token in generation:
                write(token.text)
                if interrupt.asked:
                    break
        generation.close()
        write("\n")
        report = generation.report
        self.messages = [*messages, {"role": "assistant", "content": report.text}]
        if report.finish_reason == "length" and limit == room:
            say("[the context is full: start over with /reset, or use a larger --context]")
        return figures(report)


class _Interrupt:
    """Ctrl-C asks for a stop after the token under way, so that the engine is left fit for the next message.

    A second Ctrl-C raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> _Interrupt:
        self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def _converse(conversation: Conversation, stats: bool) -> None:
    for line in _lines():
        text = line.strip()
        if text in ("/exit", "/quit"):
            return
        if text == "/reset":
            conversation.reset()
            say("[started over]")
        elif text.startswith("/help"):
            say(HELP)
        elif text:
            try:
                line_of_figures = conversation.answer(text)
            except UsageError as error:
                if not stdin().isatty():
                    raise
                say(f"error: {error}")
                continue
            if stats:
                say(line_of_figures)


def _lines() -> Iterator[str]:
    """Lines typed at a prompt, or those of a stream. Raises UsageError when a stream is not UTF-8."""
    if not stdin().isatty():
        for number, line in enumerate(stdin().buffer, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise UsageError(f"line {number} of stdin is not UTF-8 text") from None
        return
    while True:
        try:
            yield input("> ")
        except EOFError:
            say("")
            return
        except KeyboardInterrupt:
            say(f"\n[{HELP}]")


def _sampling(given: dict[str, Any], generation: Mapping[str, Any]) -> Sampling:
    """The user's choice over the authors' recommendation. Raises PackError."""
    chosen = {name: value for name, value in given.items() if value is not None}
    return options.sampling(**(recommended(generation, chosen) | chosen))
