#!/usr/bin/env python3
"""Print the tests of what has changed since a commit, one path a line: `make check` runs them.

    python tools/changed_tests.py --since main

What counts is the working tree, files that git does not know yet included, against the point where this branch left
the commit. The tests of a source are the file of its name, test_rows.py for rows.py, in the folder that mirrors its
package or in one above it; where there is none, the nearest such folder. SMOKE runs always. On stderr stands which
files have no tests of their own: `make test` is what checks those.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[1]
TESTS = PurePosixPath("tests")
MIRRORS = {
    PurePosixPath("flashrt"): TESTS,
    PurePosixPath("kernels/flashrt_kernels"): TESTS / "kernels",
    PurePosixPath("tools"): TESTS / "tools",
    TESTS: TESTS,
}
SOURCES = (".py", ".pyi", ".cpp", ".h")
SMOKE = ("tests/test_imports.py", "tests/engine/test_generation.py")


def changed_files(since: str, root: Path) -> list[str]:
    """Files that differ from where HEAD left `since`, gone ones included. Raises CalledProcessError."""

    def git(*arguments: str) -> list[str]:
        done = subprocess.run(["git", *arguments], cwd=root, check=True, stdout=subprocess.PIPE, text=True)
        return done.stdout.splitlines()

    (base,) = git("merge-base", "HEAD", since)
    return git("diff", "--name-only", "--no-renames", base) + git("ls-files", "--others", "--exclude-standard")


def mirror_of(file: str, root: Path) -> str | None:
    """The test file or folder of a source, relative to `root`; None where there is none."""
    path = PurePosixPath(file)
    if path.suffix not in SOURCES:
        return None
    if path.name.startswith("test_"):
        return file if (root / file).exists() else None
    folders = list(_mirrored(path))
    named = [folder / f"test_{path.stem}.py" for folder in folders]
    return next((str(p) for p in [*named, *folders] if p != TESTS and (root / p).exists()), None)


def _mirrored(source: PurePosixPath) -> Iterator[PurePosixPath]:
    """The folder of tests that mirrors the one of `source`, and those above it."""
    for package, tests in MIRRORS.items():
        if source.is_relative_to(package):
            folder = tests / source.parent.relative_to(package)
            yield from (p for p in (folder, *folder.parents) if p.is_relative_to(tests))


def without_those_inside(tests: Iterable[str]) -> list[str]:
    """Sorted, without files and folders that lie in another of the folders."""
    chosen = sorted(set(tests))
    return [t for t in chosen if not any(PurePosixPath(t).is_relative_to(o) for o in chosen if o != t)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--since", default="main", help="a commit, tag or branch (default: main)")
    since = parser.parse_args().since
    try:
        changed = changed_files(since, ROOT)
    except subprocess.CalledProcessError:
        print(f"nothing to compare with: git knows no {since}, or HEAD shares nothing with it", file=sys.stderr)
        return 2
    found = {file: mirror_of(file, ROOT) for file in changed}
    for file in (file for file, tests in found.items() if tests is None):
        print(f"no tests of its own: {file}", file=sys.stderr)
    print(*without_those_inside([*SMOKE, *filter(None, found.values())]), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
