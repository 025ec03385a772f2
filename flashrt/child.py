"""Python programs in processes of their own, which import nothing from the current directory.

`python -m` puts the current directory first on the path of imports: run beside a checkpoint, it would execute a json.py
that lies there. Isolated mode leaves that out, and PYTHONPATH too, which may name it; so the path is handed over.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import flashrt_kernels

_START = "import sys; sys.path[:] = {path!r}; import runpy; runpy.run_module({module!r}, None, '__main__', True)"
# Where flashrt itself lies, if nothing else on the path says so.
_ROOTS = [str(Path(__file__).parents[1]), str(Path(flashrt_kernels.__file__).parents[1])]


def command(module: str, *arguments: str) -> list[str]:
    """The command line that runs `module` with what this process can import, but for the current directory."""
    return [sys.executable, "-I", "-c", _START.format(path=_path(), module=module), *arguments]


def _path() -> list[str]:
    # Python has made absolute what PYTHONPATH names relative to the current directory.
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    refused = {_real(entry or os.curdir) for entry in ("", *named) if not os.path.isabs(entry)}
    kept = [entry for entry in sys.path if os.path.isabs(entry) and _real(entry) not in refused]
    # Flashrt may lie in the current directory itself. Last, it hides no module of that name anywhere else.
    return kept + [root for root in dict.fromkeys(_ROOTS) if root not in kept]


def _real(path: str) -> str | None:
    """None for the path of a current directory that was removed."""
    try:
        return os.path.realpath(path)
    except FileNotFoundError:
        return None
