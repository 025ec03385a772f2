"""flashrt run: answer a prompt, or continue it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from json import loads as parse_json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashrt.cli import options
from flashrt.cli.console import Progress, duration, emit, rate, say, size, stdin, write
from flashrt.engine.options import LoadOptions
from flashrt.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from flashrt.engine.report import Report
    from flashrt.text.tokenizer import Tokenizer

INTERRUPTED = 130
DEFAULT_NEW_TOKENS = 256
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def register(app: typer.Typer, name: str, guarded: Callable[..., Any]) -> None:
    app.command(name)(guarded(run))


@options.loads(*options.LOAD)
def run(
    pack: options.Model,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="TEXT", show_default=False, help="The text to answer.")
    ] = None,
    prompt_file: Annotated[
        str | None,
        typer.Option(
            "--prompt-file", metavar="FILE", show_default=False, help="Read the prompt from a UTF-8 file; - is stdin."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            "-n",
            min=1,
            metavar="N",
            show_default=False,
            help="Stop after N tokens. Omitted: 256, or where the context ends.",
        ),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            show_default=False,
            help="Ask the prompt as one message, in the model's chat template, or continue it as text. "
            "Omitted: ask, where the model has a template.",
        ),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option("--system", metavar="TEXT", show_default=False, help="A system message before the prompt."),
    ] = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    seed: options.Seed = None,
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", metavar="TEXT", show_default=False, help="Stop before this text; may be repeated."),
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after an end-of-text token.")] = False,
    json_schema: Annotated[
        Path | None,
        typer.Option(
            "--json-schema", metavar="FILE", show_default=False, help="Answer with JSON that the schema in FILE allows."
        ),
    ] = None,
    *,
    load: LoadOptions,
    json: options.Json = False,
) -> None:
    """Answer a prompt: the text on stdout as it comes, a closing line of figures on stderr.

    A model with a chat template answers; a base model continues the text, as --raw makes every model do. Greedy unless
    --temperature is given. With neither --prompt nor --prompt-file the prompt is read from stdin.

    Example: flashrt run demo --budget-gb 1 --prompt "What is a monad?"
    Example: flashrt run demo --budget-gb 1 --raw --prompt "def fibonacci(n):" --max-new-tokens 64
    """
    choice = options.sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
    )
    if system is not None and chat is False:
        raise UsageError("--system and --raw contradict each other: without a chat template there is no system message")
    check_argument(system, "--system")
    text = read_prompt(prompt, prompt_file)
    schema = None if json_schema is None else _read_schema(json_schema, ignore_eos)

    from flashrt.budget.plan import Workload
    from flashrt.cli import session
    from flashrt.config import checked_context
    from flashrt.engine.grammar import Grammars

    model = session.open_model(pack, load)
    ids = _prompt_ids(model.tokenizer, text, chat, system)
    checked_context(model.spec, load.context, 1)
    grammar = None
    if schema is not None:
        grammar = Grammars(model.tokenizer, model.spec.vocab, model.spec.eos).json_schema(schema)
    length, new = _lengths(model.spec.context, load.context, len(ids), max_new_tokens)
    with Progress() as progress, session.load(model, Workload(length, prompt=len(ids)), progress) as engine:
        session.resume(engine, load.session, chat=False, prompt=ids)
        reuse = load.session is not None
        generation = engine.generate(
            ids, new, choice, stop=stop or (), ignore_eos=ignore_eos, reuse=reuse, grammar=grammar
        )
        interrupted = False
        try:
            for token in generation:
                progress.stop()
                if not json:
                    write(token.text)
        except KeyboardInterrupt:
            interrupted = True
            generation.close()
        if json:
            emit(generation.report.to_json())
        else:
            write("\n")
            say(figures(generation.report))
        session.save(engine, load.session)
    if interrupted:
        sys.exit(INTERRUPTED)


def figures(report: Report) -> str:
    """The closing line."""
    parts = [f"{report.new_tokens} tokens"]
    if report.decode_tok_per_s:
        parts[0] += f", {report.decode_tok_per_s:.2f} tokens/s"
    if report.tokens_per_pass and report.tokens_per_pass > 1:
        parts.append(f"{report.tokens_per_pass:.2f} tokens per pass")
    if report.resumed_tokens:
        parts.append(f"{report.resumed_tokens} of {report.prompt_tokens} prompt tokens resumed")
    parts.append(f"first after {duration(report.ttft_s)}")
    if report.bytes_read_per_token:
        read = f"{size(report.bytes_read_per_token)} read per token"
        if report.disk_bytes_per_s:
            read += f" at {rate(report.disk_bytes_per_s)}"
        if report.disk_roofline_share:
            read += f", {report.disk_roofline_share:.0%} of the disk's rate"
        parts.append(read)
    if report.loss is not None:
        parts.append(f"sparse: loss below {report.loss:.1%}")
    parts += report.remarks
    peak = report.device_peak_bytes or report.peak_rss_bytes
    parts.append(f"peak memory {size(peak)} of {size(report.budget_bytes)}")
    if report.finish_reason == "interrupted":
        parts.append("interrupted")
    return "[" + " · ".join(parts) + "]"


def read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    """The prompt, wherever it is. Raises UsageError when it is empty, unreadable or not UTF-8."""
    if prompt is not None and prompt_file is not None:
        raise UsageError("--prompt and --prompt-file contradict each other: give one of them")
    if prompt is not None:
        check_argument(prompt, "the prompt")
        text = prompt
    elif prompt_file is not None and prompt_file != "-":
        text = read_text(Path(prompt_file))
    elif prompt_file is None and stdin().isatty():
        raise UsageError("there is no prompt: give --prompt TEXT, --prompt-file FILE, or text on stdin")
    else:
        text = _utf8(stdin().buffer.read(), "the prompt on stdin")
    if not text:
        raise UsageError("the prompt is empty: give at least one character")
    return text


def read_text(path: Path) -> str:
    """A text file. Raises UsageError when it cannot be read or is not UTF-8."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    return _utf8(data, str(path))


def _read_schema(path: Path, ignore_eos: bool) -> dict[str, Any]:
    """A JSON schema. Raises UsageError."""
    if ignore_eos:
        raise UsageError("--json-schema ends where its JSON does: leave --ignore-eos out")
    try:
        found = parse_json(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise UsageError(f"{path} holds no JSON schema, which is an object")
    return found


def check_argument(text: str | None, what: str) -> None:
    """Raises UsageError for a text of the command line that is not UTF-8."""
    if text is not None:
        _utf8(text.encode("utf-8", "surrogateescape"), what)


def _doubled_bos(tokenizer: Tokenizer, ids: list[int]) -> str | None:
    """What to say of a prompt that brings the beginning token which is put before every text; None where it does not.

    It is read as it was written: two of them.
    """
    if tokenizer.bos is None or ids[:2] != [tokenizer.bos] * 2:
        return None
    token = tokenizer.text.special_tokens["bos_token"]
    return (
        f"note: the prompt begins with {token}, which is put before every text anyway: it is there twice. Leave it out"
    )


def _utf8(data: bytes, what: str) -> str:
    """Text without the byte order mark that some editors put before it: no model ever saw one."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte {error.start} is 0x{data[error.start]:02x}"
        if data.startswith(UTF16_MARKS):
            found = "it begins as UTF-16 does, save it as UTF-8"
        raise UsageError(f"{what} is not UTF-8 text: {found}") from None


def _prompt_ids(tokenizer: Tokenizer, text: str, chat: bool | None, system: str | None) -> list[int]:
    """The prompt as tokens. Without a say in the matter (`chat` is None), a model with a chat template is asked."""
    if chat or system is not None or (chat is None and tokenizer.text.chat_template is not None):
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": text})
        from flashrt.text.conversation import encode_conversation

        try:
            return encode_conversation(tokenizer, tokenizer.chat_template, messages)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; --raw continues the prompt without it") from None
    ids = tokenizer.encode(text)
    if warning := _doubled_bos(tokenizer, ids):
        say(warning)
    return ids


def _lengths(limit: int, asked: int | None, prompt: int, new: int | None) -> tuple[int, int]:
    """Positions to plan for, and how many tokens to generate. Raises UsageError when they do not fit."""
    room = (asked or limit) - prompt
    within = f"--context {asked}" if asked else f"the model's context of {limit} tokens"
    if room < 1:
        raise UsageError(f"the prompt has {prompt} tokens, which leaves no room for an answer in {within}: shorten it")
    if new is not None and new > room:
        raise UsageError(
            f"{prompt} prompt tokens and {new} new ones do not fit in {within}: lower --max-new-tokens to {room}"
        )
    new = new or min(DEFAULT_NEW_TOKENS, room)
    return asked or prompt + new, new
