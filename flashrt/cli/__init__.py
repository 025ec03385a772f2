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
    except SystemExit:
        sys.stdout.flush()  # a text of help that cannot be written is a failure, too
        raise
