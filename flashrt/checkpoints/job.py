"""What a child process that prepares a pack says to its parent, one JSON object a line.

{"stage", "done", "total"} while it works, {"note"} where something has to be said, {"pack"} with the place of the pack
at the end, {"error", "message"} when it fails.
"""

from __future__ import annotations

import json
import signal
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

from flashrt.checkpoints.resolve import Progress
from flashrt.errors import CheckpointWarning, FlashrtError

INTERVAL_S = 0.1


def run(work: Callable[[Progress], dict[str, Any]]) -> int:
    """Do the work, which gives what is said at the end; the exit status."""
    # Ctrl-C and a terminated parent end the packer the same way: it removes the file that it was writing.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    reported = 0.0

    def report(stage: str, done: int, total: int) -> None:
        nonlocal reported
        now = time.monotonic()
        if now - reported >= INTERVAL_S or done == total:
            reported = now
            _say({"stage": stage, "done": done, "total": total})

    def note(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        if issubclass(category, CheckpointWarning):
            _say({"note": str(message)})

    warnings.showwarning = note
    warnings.simplefilter("always", CheckpointWarning)
    try:
        _say(work(report))
    except FlashrtError as error:
        _say({"error": type(error).__name__, "message": str(error)})
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever asked for the pack is gone
        sys.stdout = None
        return 1
    return 0


def _say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)
