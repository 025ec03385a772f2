"""The application: commands live in one file each and are imported when they are called."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Annotated

import typer

import flashrt
from flashrt.cli.guard import guarded

# Command → module, in the order in which `flashrt --help` lists them.
COMMANDS = {
    "pull": "pull",
    "pack": "pack",
    "calibrate": "calibrate",
    "plan": "plan",
    "run": "run",
    "chat": "chat",
    "serve": "serve",
    "batch": "batch",
    "eval": "evaluate",
    "bench": "bench",
    "models": "models",
    "remove": "remove",
    "inspect": "inspect",
    "verify": "verify",
    "doctor": "doctor",
}


def build(arguments: Sequence[str]) -> typer.Typer:
    """The application, with the one command that `arguments` call, or with all of them when they call none."""
    # -h is as good as --help.
    app = typer.Typer(
        context_settings={"help_option_names": ["-h", "--help"]},
        pretty_exceptions_enable=False,
        no_args_is_help=True,
    )
    app.callback()(_root)
    called = arguments[0] if arguments and arguments[0] in COMMANDS else None
    for name, module in COMMANDS.items():
        if called in (None, name):
            importlib.import_module(f"flashrt.cli.{module}").register(app, name, guarded)
    return app


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
    directory, a .gguf file, a hub repository (org/name, org/name:Q4_K_M), or one of the demo models, demo and
    demo-small.

    Example: flashrt run demo --budget-gb 1 --prompt "What is a monad?"

    Exit status: 0 done, 1 failed, 2 bad usage, 130 interrupted.
    """
