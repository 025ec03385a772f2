"""How the program ends: one message on stderr and a status, whatever went wrong, with whatever streams it was given."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

from flashrt.cli.console import say
from flashrt.errors import FlashrtError, FlashrtWarning, UsageError

FAILED, USAGE, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141


def guard_streams() -> None:
    """Make what the caller closed safe to go on with. Raises UsageError when stdout is closed.

    The number of a closed stream would go to the next file that is opened, and what is printed into that file.
    """
    while (free := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(free)
    if sys.stderr is None:  # Python's sign of a closed stream
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - it lasts as long as the program
    if sys.stdout is None:
        raise UsageError("stdout is closed, results have nowhere to go: redirect it to a file, or to /dev/null")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character must not end the run


def show_notes() -> None:
    """From now on, what flashrt says beside what it does is a line on stderr each time."""
    warnings.simplefilter("always", FlashrtWarning)
    before = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, FlashrtWarning):
            say(f"note: {message}")
        else:
            before(message, category, *rest, **more)

    warnings.showwarning = show


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose failures end the program: one message on stderr, a status, no traceback."""

    @functools.wraps(function)
    def wrapper(*arguments: Any, **options: Any) -> Any:
        try:
            show_notes()
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
                where = "stdout: "
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
    with contextlib.suppress(OSError):
        sys.stderr.write(f"error: {message}\n")
        sys.stderr.flush()
    raise SystemExit(status) from None
