"""What commands print: people's text on stderr, results on stdout, progress as a bar or as plain lines."""

from __future__ import annotations

import json
import sys
import time
from types import TracebackType
from typing import Any, TextIO

from flashrt.config import GIB
from flashrt.errors import UsageError

BAR_MODULES = ("rich.progress",)  # what a bar takes
QUIET_S = 2.0  # without a terminal, work that is over before this prints nothing
INTERVAL_S = 5.0


def say(text: str) -> None:
    """A line for people, where it cannot mix with results."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def write(text: str) -> None:
    """Text of the answer, shown at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def stdin() -> TextIO:
    """The stream that is read from. Raises UsageError when the caller closed it."""
    if sys.stdin is None:
        raise UsageError("stdin is closed, there is nothing to read: give the text on it, or as an option")
    return sys.stdin


def emit(data: Any) -> None:
    """One JSON object on one line of stdout."""
    sys.stdout.write(json.dumps(_finite(data), ensure_ascii=False) + "\n")
    sys.stdout.flush()


def _finite(data: Any) -> Any:
    """JSON knows no infinity and no NaN."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not abs(data) < float("inf") else data


def size(nbytes: float) -> str:
    """Bytes for people, in the unit of budgets."""
    for unit, factor in (("GiB", GIB), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(nbytes) >= factor:
            value = nbytes / factor
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
    return f"{nbytes:.0f} B"


def rate(bytes_per_s: float) -> str:
    """A transfer rate for people."""
    return f"{bytes_per_s / 1e9:.2f} GB/s" if bytes_per_s >= 1e9 else f"{bytes_per_s / 1e6:.0f} MB/s"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.{2 if seconds < 10 else 1}f} s"
    minutes, rest = divmod(int(seconds + 0.5), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def table(*headings: str) -> Any:
    """A rich table whose first column is text and whose others are figures."""
    from rich import box
    from rich.table import Table

    result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, heading in enumerate(headings):
        result.add_column(heading, justify="right" if i else "left", no_wrap=True)
    return result


def show(renderable: Any) -> None:
    """Print something of rich's on stdout, coloured on a terminal only."""
    from rich.console import Console

    console = Console(highlight=False)
    console.print(renderable)


class Progress:
    """How far long work has come: `progress(what, done, total)`. A bar on a terminal, plain lines otherwise.

    unit: 'bytes', or what is counted ('tokens')
    """

    def __init__(self, unit: str = "bytes") -> None:
        self._unit = unit
        self._bar: Any = _bar() if sys.stderr.isatty() else None
        self._tasks: dict[str, Any] = {}
        self._stage, self._stopped = "", False
        self._began = self._printed = self._first = 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Show nothing more."""
        self._stopped = True
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._stopped:
            return
        if self._bar is not None:
            self._draw(stage, done, total)
        else:
            self._print(stage, done, total)

    def of(self, stage: str) -> Any:
        """The same for work that reports (done, total) only."""
        return lambda done, total: self(stage, done, total)

    def _draw(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._bar.start()
            self._tasks[stage] = self._bar.add_task(stage, total=total, amount="")
            self._begin(stage, done)
        self._bar.update(self._tasks[stage], completed=done, total=total, amount=self._amount(done, total))

    def _print(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self._begin(stage, done)
        now = time.monotonic()
        due = now - self._printed >= INTERVAL_S if self._printed else now - self._began >= QUIET_S
        over = 0 < total <= done
        if self._printed == float("inf") or total <= 0 or not (due or (over and self._printed)):
            return
        self._printed = float("inf") if over else now
        say(f"{stage}: {100 * done / total:.0f}% ({self._amount(done, total)}{self._left(done, total)})")

    def _begin(self, stage: str, done: int) -> None:
        self._stage, self._began, self._printed, self._first = stage, time.monotonic(), 0.0, done

    def _left(self, done: int, total: int) -> str:
        """The time left at the rate so far; a bar has a column for it."""
        came, seconds = done - self._first, time.monotonic() - self._began
        return f", {duration(seconds * (total - done) / came)} left" if came > 0 and done < total else ""

    def _amount(self, done: int, total: int) -> str:
        if self._unit != "bytes" or self._stage.startswith("fetching"):
            return f"{done} of {total} {self._unit if self._unit != 'bytes' else 'parts'}".rstrip()
        seconds = time.monotonic() - self._began
        speed = f", {rate((done - self._first) / seconds)}" if seconds > 0.5 else ""
        return f"{size(done)} of {size(total)}{speed}"


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
