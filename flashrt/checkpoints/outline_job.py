"""Previewing a hub repository; as a program, for `flashrt.checkpoints.outlines`, which runs it in a child process.

    python -m flashrt.checkpoints.outline_job REPOSITORY DTYPE DIRECTORY

Says what `flashrt.checkpoints.job` does, with {"download"}, the bytes of the repository, beside the pack; that is null
when the hub cannot be asked.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from flashrt.checkpoints.job import run
from flashrt.checkpoints.pack_job import how_to_pack
from flashrt.checkpoints.resolve import Progress
from flashrt.storage.layout import AHEAD_DIR
from flashrt.storage.outline import write_outline
from flashrt.storage.sources.preview import open_preview


def outline(repository: str, dtype: str, out: Path, progress: Progress) -> dict[str, Any]:
    """Write the outline of a repository's pack below the directory `out`."""
    pack = out / "pack"
    pack.mkdir()
    preview = open_preview(repository, out / "checkpoint", lambda done, total: progress("fetching", done, total))
    if preview is None:
        return {"pack": None, "download": 0}
    with preview.checkpoint as source:
        source.validate()
        write_outline(source, pack, *how_to_pack(source, dtype))
        if source.ahead is not None:
            (pack / AHEAD_DIR).mkdir()
            write_outline(source.ahead, pack / AHEAD_DIR, *how_to_pack(source.ahead, dtype))
    return {"pack": str(pack), "download": preview.download_bytes}


if __name__ == "__main__":
    sys.exit(run(lambda progress: outline(sys.argv[1], sys.argv[2], Path(sys.argv[3]), progress)))
