"""A record: what a benchmark leaves behind, in one form for all of them, printed last and written where asked.

schema      1
tool        the benchmark
commit      hash of the commit that was measured, and whether files differed from it; null where unknown
date        of the measurement, ISO 8601; null where unknown
recorded    hash and date of the commit that added a record which lacks its own
machine     processor, cores, instruction set, memory, platform
versions    of what took part
command     that makes the record again; paths by their last names
parameters  model and settings
samples     one dictionary of labels and figures for each run
summary     text and tables, of medians and ranges: what the page shows
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tools.benchmarks.harness import facts
from tools.benchmarks.harness.samples import Sample

SCHEMA = 1
EXPANDED = 5  # record, summary, tables, table, rows


class Benchmark:
    """A command line whose result is a record."""

    def __init__(self, module: str, description: str | None) -> None:
        self._tool, self._start = module.rpartition(".")[2], f"python -m {module}"
        self.parser = argparse.ArgumentParser(
            prog=self._start, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def parse(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """The arguments given, or the process's. Adds --out."""
        self.parser.add_argument("--out", type=Path, help="also write the record here")
        given = sys.argv[1:] if arguments is None else list(arguments)
        args = self.parser.parse_args(given)
        self._out = args.out
        # Taken at the start: whoever commits meanwhile does not change what is measured.
        self._began = {"commit": facts.commit(), "date": facts.date()}
        self._command = f"{self._start} {_public(given, args)}"
        return args

    def publish(
        self,
        parameters: dict[str, Any],
        samples: list[Sample],
        summary: dict[str, Any],
        machine: Mapping[str, Any] = MappingProxyType({}),
        versions: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Write the record, and print it on the last line. `machine` and `versions` hold more facts than all know."""
        record = {
            "schema": SCHEMA,
            "tool": self._tool,
            **self._began,
            "machine": facts.machine() | machine,
            "versions": facts.versions() | versions,
            "command": self._command,
            "parameters": parameters,
            "samples": samples,
            "summary": summary,
        }
        if self._out:
            self._out.write_text(dumps(record) + "\n")
        print(json.dumps(record))


def load(path: Path) -> dict[str, Any]:
    """Read a record. Raises ValueError where the file is none."""
    record = json.loads(path.read_text())
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise ValueError(f"{path} is not a record of schema {SCHEMA}")
    return record


def dumps(value: Any, levels: int = EXPANDED, line: str = "\n") -> str:
    """JSON with a line for each sample and each row of a table: `levels` of nesting are spread over lines."""
    if levels == 0 or not value or not isinstance(value, dict | list):
        return json.dumps(value)
    inner = line + " "
    if isinstance(value, dict):
        below = {key: 1 if key == "samples" else levels - 1 for key in value}
        entries = [f"{json.dumps(key)}: {dumps(entry, below[key], inner)}" for key, entry in value.items()]
        return "{" + inner + f",{inner}".join(entries) + line + "}"
    return "[" + inner + f",{inner}".join(dumps(entry, levels - 1, inner) for entry in value) + line + "]"


def _public(given: Sequence[str], args: argparse.Namespace) -> str:
    """The words of a command line without --out; paths by their last names, as their folders are anybody's own."""
    paths = {str(path): path.name for value in vars(args).values() for path in _paths(value)}
    words = list(given)
    if "--out" in words:
        at = words.index("--out")
        del words[at : at + 2]
    return shlex.join(paths.get(word, word) for word in words)


def _paths(value: Any) -> Iterable[Path]:
    values = value if isinstance(value, list | tuple) else [value]
    return (entry for entry in values if isinstance(entry, Path))


def say(line: str) -> None:
    """A line of progress."""
    print(line, file=sys.stderr, flush=True)
