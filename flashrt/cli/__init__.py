"""The command line. Commands live in one file each and are imported when they are called."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

import flashrt
from flashrt.errors import FlashrtError, UsageError

# Command → module, in the order in which `flashrt --help` lists them.
COMMANDS = {
    "pull": "pull",
    "pack": "pack",
    "calibrate": "calibrate",
    "plan": "plan",
    "run": "run",
    "chat": "chat",
    "eval": "evaluate",
    "bench": "bench",
    "inspect": "inspect",
    "verify": "verify",
    "doctor": "doctor",
}
FAILED, USAGE, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141


def main() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character must not end the run
    guarded(lambda: build(sys.argv[1:])(prog_name="flashrt"))()


def build(arguments: Sequence[str]) -> typer.Typer:
    """The application, with the one command that `arguments` call, or with all of them when they call none."""
    # -h is as good as --help.
    app = typer.Typer(
        context_settings={"help_option_names": ["-h", "--help"]},
        pretty_exceptions_enable=False,
        no_args_is_help=True,
        add_completion=False,
    )
    app.callback()(_root)
    called = arguments[0] if arguments and arguments[0] in COMMANDS else None
    for name, module in COMMANDS.items():
        if called in (None, name):
            importlib.import_module(f"flashrt.cli.{module}").register(app, name, guarded)
    return app


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose failures end the program: one message on stderr, a status, no traceback."""

    @functools.wraps(function)
    def wrapper(*arguments: Any, **options: Any) -> Any:
        try:
            result = function(*arguments, **options)
            sys.stdout.flush()
            return result
        except FlashrtError as error:
            _fail(str(error), USAGE if isinstance(error, UsageError) else FAILED)
        except KeyboardInterrupt:
            _fail("interrupted", INTERRUPTED)
        except BrokenPipeError:
            _close_stdout()
            sys.exit(BROKEN_PIPE)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            try:
                sys.stdout.flush()
            except OSError:
                _close_stdout()
            _fail(f"{where}{error.strerror or error}", FAILED)
        except MemoryError:
            _fail("out of memory: use a smaller --budget-gb or --context", FAILED)
        except RuntimeError as error:
            if type(error).__name__ != "BackendUnavailable":
                raise
            _fail(str(error), FAILED)

    return wrapper


def _close_stdout() -> None:
    """Nothing can be written any more: the interpreter must not complain about it when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, status: int) -> None:
    sys.stderr.write(f"error: {message}\n")
    sys.exit(status)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"flashrt {flashrt.__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Run language models that do not fit in memory, under a hard memory budget.

    A model is a pack (made by `flashrt pack`), or a checkpoint, which is packed once into the cache: a Hugging Face
    directory, a .gguf file, a hub repository (org/name), or one of the demo models, demo and demo-small.

    Example: flashrt run demo --budget-gb 1 --prompt "def fibonacci(n):"

    Exit status: 0 done, 1 failed, 2 bad usage, 130 interrupted.
    """
