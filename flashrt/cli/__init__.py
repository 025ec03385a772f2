"""The command line.

What is costly to import is imported once failures are guarded: Ctrl-C may come at any time.
"""

from __future__ import annotations

import sys

from flashrt.cli.guard import guard_streams, guarded


def main() -> None:
    """The console script."""
    guarded(_called)()


def _called() -> None:
    guard_streams()
    from flashrt.cli.app import build

    try:
        build(sys.argv[1:])(prog_name="flashrt")
    except SystemExit as end:
        if _is_interrupt(end):  # typer ends silently where Ctrl-C strikes before a command runs
            raise KeyboardInterrupt from None
        sys.stdout.flush()  # a text of help that cannot be written is a failure, too
        raise


def _is_interrupt(end: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an end that nobody has reported."""
    while end is not None and not isinstance(end, KeyboardInterrupt):
        end = end.__cause__ or (None if end.__suppress_context__ else end.__context__)
    return end is not None
