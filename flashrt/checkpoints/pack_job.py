"""Fetching and packing a checkpoint; as a program, for `flashrt.checkpoints.resolve`, which runs it in a child process.

    python -m flashrt.checkpoints.pack_job CHECKPOINT OUT DTYPE CACHE [CONTEXT]

Prints one JSON object a line: {"stage", "done", "total"} while it works, {"error", "message"} when it fails.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

from flashrt.checkpoints.resolve import Progress
from flashrt.config import checked_context
from flashrt.errors import FlashrtError
from flashrt.storage.kept import kept_of
from flashrt.storage.kept_rows import KeptEncoder
from flashrt.storage.manifest import Manifest
from flashrt.storage.names import AUTO, CHECKPOINTS, DEMO_NAMES
from flashrt.storage.packer import pack
from flashrt.storage.sources import open_checkpoint
from flashrt.storage.sources.demo import fetch_demo
from flashrt.storage.sources.hub import fetch_repository
from flashrt_kernels.rows import Codec

INTERVAL_S = 0.1


def fetch_checkpoint(name: str, cache: Path, out: Path | None, progress: Progress) -> Path:
    """Bring a demo model or a hub repository to this machine, into `out` or a cache; return where it is."""
    if name in DEMO_NAMES:
        return fetch_demo(name, out or cache / CHECKPOINTS, _fetching(progress))
    return fetch_repository(name, out)


def pack_checkpoint(
    checkpoint: str | Path, out: Path, dtype: str, cache: Path, progress: Progress, context: int | None = None
) -> Manifest:
    """Pack a checkpoint, fetched first if it has to be, into the directory `out`; `dtype` is one of DTYPE_NAMES.

    Raises UsageError, before anything is packed, when the model does not support `context`.
    """
    with open_checkpoint(checkpoint, cache / CHECKPOINTS, _fetching(progress)) as source:
        source.validate()
        checked_context(source.spec, context, 1)
        kept = kept_of(source) if dtype == AUTO else None
        encoder = None if kept is None else KeptEncoder(source, kept)
        codec = Codec.INT8 if dtype == AUTO else Codec(dtype)

        def report(file: str, done: int, total: int) -> None:
            progress("packing", done, total)

        return pack(source, out, codec, progress=report, encoder=encoder, kept=kept)


def _fetching(progress: Progress) -> Progress:
    return lambda title, done, total: progress("fetching", done, total)


def main() -> int:
    # Ctrl-C and a terminated parent end the packer the same way: it removes the file that it was writing.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    checkpoint, out, dtype, cache, *asked = sys.argv[1:]
    reported = 0.0

    def report(stage: str, done: int, total: int) -> None:
        nonlocal reported
        now = time.monotonic()
        if now - reported >= INTERVAL_S or done == total:
            reported = now
            print(json.dumps({"stage": stage, "done": done, "total": total}), flush=True)

    try:
        pack_checkpoint(checkpoint, Path(out), dtype, Path(cache), report, int(asked[0]) if asked else None)
    except FlashrtError as error:
        print(json.dumps({"error": type(error).__name__, "message": str(error)}), flush=True)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever asked for the pack is gone
        sys.stdout = None
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
