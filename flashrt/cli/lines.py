"""What people type, or what comes on stdin, as messages."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from flashrt.cli.console import say, stdin
from flashrt.errors import UsageError

FENCE = '"""'  # a message of several lines stands between two of these
KEPT_LINES = 1000
LARGEST_HISTORY = 1 << 20  # bytes; a larger file is not one that this program wrote
EDITING = ("readline",) if importlib.util.find_spec("readline") else ()  # it gives input() its line editing


def typed_messages(hint: str) -> Iterator[str]:
    """Messages typed at a prompt, with editing and the history of earlier chats. `hint` answers a Ctrl-C."""
    with _History():
        yield from _Messages(lambda prompt: _typed(prompt, hint))


def streamed_messages() -> Iterator[str]:
    """Messages on stdin, a line each. Raises UsageError where they are not UTF-8, and where one does not end."""
    lines = enumerate(stdin().buffer, 1)

    def read(prompt: str) -> str | None:
        number, line = next(lines, (0, b""))
        if not number:
            return None
        try:
            return line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            raise UsageError(f"line {number} of stdin is not UTF-8 text") from None

    messages = _Messages(read)
    yield from messages
    if messages.cut:
        raise UsageError(f"stdin ends within a message that {FENCE} begins: end it with {FENCE}")


class _Messages:
    """Messages out of lines: one each, or what stands between two fences.

    read: the next line, without its end; None at the end; '' where one was given up
    cut: the lines ended within fences
    """

    def __init__(self, read: Callable[[str], str | None]) -> None:
        self._read, self.cut = read, False

    def __iter__(self) -> Iterator[str]:
        while (line := self._read("> ")) is not None:
            if not line.lstrip().startswith(FENCE):
                yield line
            elif (message := self._fenced(line.lstrip()[len(FENCE) :])) is not None:
                yield message

    def _fenced(self, first: str) -> str | None:
        """The message that begins with `first`, without its fences; None where it does not end."""
        lines, line = list[str](), first
        while not line.rstrip().endswith(FENCE):
            lines.append(line)
            try:
                found = self._read("... ")
            except KeyboardInterrupt:
                return None
            if found is None:
                self.cut = True
                return None
            line = found
        lines.append(line.rstrip()[: -len(FENCE)])
        return "\n".join(lines).strip("\n")


def _typed(prompt: str, hint: str) -> str | None:
    """A line; what is pasted is one, however many lines it has."""
    while True:
        try:
            return input(prompt)
        except EOFError:
            say("")
            return None
        except KeyboardInterrupt:
            say(f"\n[{hint}]")
            if prompt != "> ":  # within fences: the message is given up
                raise


class _History:
    """Lines of earlier chats, in a file that only its owner can read. Without one, or without readline, there are none.

    An editor that cannot keep its history is no reason to end a chat.
    """

    def __enter__(self) -> None:
        if not EDITING:
            return
        import readline

        # Python switches it off: its own prompt takes one line at a time.
        if "libedit" not in (readline.__doc__ or ""):
            readline.parse_and_bind("set enable-bracketed-paste on")
        readline.set_history_length(KEPT_LINES)
        with contextlib.suppress(OSError):
            if history_file().stat().st_size <= LARGEST_HISTORY:
                readline.read_history_file(history_file())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not EDITING:
            return
        import readline

        with contextlib.suppress(OSError):
            file = history_file()
            file.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0o600))
            readline.write_history_file(file)


def history_file() -> Path:
    """$XDG_STATE_HOME/flashrt/chat-history, or ~/.local/state/flashrt/chat-history."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "flashrt" / "chat-history"
