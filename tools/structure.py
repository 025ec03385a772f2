#!/usr/bin/env python3
"""Counts that say how a checkout is built, to compare one commit with another.

    python -m tools.structure [CHECKOUT] [--python CHECKOUT/.venv/bin/python] [--pack PACK]

ffn_kind_files  files of flashrt/ and kernels/ whose code (identifiers, not comments or texts) names a particular kind
                of FFN, outside of the kinds' own files (those called after one) and of what describes models and
                files (arch, storage, sparsity, spec)
widest_class    the class with the most methods, properties included
parameters      of all functions and methods, self and cls left out: 95th percentile and maximum
import_circles  groups of modules that reach each other by imports: those at import time, with those for type checkers,
                and with those inside functions too
kernel_depth    frames of flashrt from `main` of the command line to the kernel of an FFN, both counted, in the last
                token that a pack decodes: a tiny one of random weights unless one is named
words           of docs/architecture.md

The depth is null where --python does not run the checkout. JSON is printed last.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KINDS = re.compile(
    r"expert|moe\b|resident_?(rows|memory)|adaptive|follow(ing|ed)\b|channel|thinned|sparse_?rows"
    r"|row_?(cache|sparsity|memory|fit|reads|index)",
    re.I,
)
OWN_FILES = re.compile(r"expert|router|forecast|resident|adaptive|channel|thinned|sparse|row", re.I)
DESCRIPTIONS = ("arch", "storage", "sparsity", "spec")
KERNEL = "glu"
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
# Run with the checkout's interpreter: the command line on a pack, watched from within.
TRACED = """
import json, sys

import flashrt
from flashrt.cli import main

depth = None

def own(frame):
    return frame.f_globals.get("__name__", "").partition(".")[0] in ("flashrt", "flashrt_kernels")

def watch(frame, event, argument):
    global depth
    if event == "call" and frame.f_code.co_name == "KERNEL" and own(frame):
        depth = 0
        while frame is not None:
            depth += own(frame)
            frame = frame.f_back

sys.argv = ["flashrt", "run", sys.argv[1], "--raw", "--prompt", "ab", "--max-new-tokens", "4", "--ignore-eos"]
sys.argv += ["--speculate", "off", "--threads", "1", "--json"]
sys.setprofile(watch)
try:
    main()
except SystemExit:
    pass
sys.setprofile(None)
print(json.dumps([flashrt.__file__, depth]))
""".replace("KERNEL", KERNEL)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", nargs="?", type=Path, default=ROOT)
    parser.add_argument("--python", default=sys.executable, help="an interpreter that has the checkout installed")
    parser.add_argument("--pack", type=Path, help="to trace a run of")
    args = parser.parse_args(arguments)
    checkout = args.checkout.resolve()
    result = structure(checkout) | {"kernel_depth": kernel_depth(checkout, args.python, args.pack)}
    print(json.dumps(result))


def structure(checkout: Path) -> dict[str, Any]:
    """All that can be counted without running anything."""
    trees = parsed(checkout)
    kinds = [module for module, tree in trees.items() if names_a_kind(module, tree)]
    circles = {name: circles_of(import_graph(trees, find)) for name, find in IMPORTS.items()}
    return {
        "modules": len(trees),
        "ffn_kind_files": {"count": len(kinds), "modules": kinds},
        "widest_class": widest_class(trees),
        "parameters": parameters(trees),
        "import_circles": {name: {"count": len(found), "circles": found} for name, found in circles.items()},
        "words": len((checkout / "docs" / "architecture.md").read_text().split()),
    }


def parsed(checkout: Path) -> dict[str, ast.Module]:
    """Every module of flashrt and of its kernels."""
    found = {}
    for package, folder in (("flashrt", checkout), ("flashrt_kernels", checkout / "kernels")):
        for path in sorted((folder / package).rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return found


def names_a_kind(module: str, tree: ast.Module) -> bool:
    *parents, own = module.split(".")
    if OWN_FILES.search(own) or set(DESCRIPTIONS) & {*parents[1:], own}:
        return False
    return any(KINDS.search(name) for name in identifiers(tree))


def identifiers(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.alias(name=name):
                yield name
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.keyword(arg=str(name)):
                yield name


def widest_class(trees: dict[str, ast.Module]) -> dict[str, Any]:
    classes = [
        (sum(isinstance(entry, FUNCTIONS) for entry in node.body), f"{module}.{node.name}")
        for module, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    ]
    methods, name = max(classes)
    return {"name": name, "methods": methods}


def parameters(trees: dict[str, ast.Module]) -> dict[str, Any]:
    counts = [
        (sum(a.arg not in ("self", "cls") for a in arguments_of(node.args)), f"{module}.{node.name}")
        for module, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, FUNCTIONS)
    ]
    most, name = max(counts)
    p95 = statistics.quantiles([count for count, _ in counts], n=20, method="inclusive")[-1]
    return {"functions": len(counts), "p95": p95, "max": most, "of": name}


def arguments_of(args: ast.arguments) -> Iterator[ast.arg]:
    yield from [*args.posonlyargs, *args.args, *args.kwonlyargs]
    yield from (extra for extra in (args.vararg, args.kwarg) if extra)


def import_graph(trees: dict[str, ast.Module], find: Callable[[ast.AST], Iterator[str]]) -> dict[str, set[str]]:
    """Module → the other modules that it imports."""
    return {
        module: {target for name in find(tree) if (target := known(name, trees))} - {module}
        for module, tree in trees.items()
    }


def at_import(tree: ast.AST) -> Iterator[str]:
    """What importing the module imports."""
    return imported(tree, lambda node: isinstance(node, FUNCTIONS) or is_for_types(node))


def with_types(tree: ast.AST) -> Iterator[str]:
    """And what it imports for type checkers."""
    return imported(tree, lambda node: isinstance(node, FUNCTIONS))


def anywhere(tree: ast.AST) -> Iterator[str]:
    """And what its functions import."""
    return imported(tree, lambda node: False)


IMPORTS = {"at import": at_import, "with type checking": with_types, "with functions": anywhere}


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imported(tree: ast.AST, left_out: Callable[[ast.AST], bool]) -> Iterator[str]:
    """Names that the imports below a node name."""
    for node in ast.iter_child_nodes(tree):
        if left_out(node):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from imported(node, left_out)


def known(name: str, trees: dict[str, ast.Module]) -> str | None:
    """The module that an imported name lies in."""
    while name and name not in trees:
        name = name.rpartition(".")[0]
    return name or None


def circles_of(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of more than one module, each of which reaches all others of its group."""
    reached = {module: reachable(graph, module) for module in graph}
    groups = {
        tuple(sorted({module} | {other for other in reached[module] if module in reached[other]})) for module in graph
    }
    return [list(group) for group in sorted(groups) if len(group) > 1]


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        fresh = graph[waiting.pop()] - found
        found |= fresh
        waiting += fresh
    return found


def kernel_depth(checkout: Path, python: str, pack: Path | None) -> int | None:
    """Frames from `main` to a kernel; None, and a line that says why, where that cannot be counted."""
    with tempfile.TemporaryDirectory() as folder:
        path = pack or make_pack(Path(folder) / "pack")
        env = os.environ | {"XDG_CACHE_HOME": folder}
        done = subprocess.run(
            [python, "-c", TRACED, str(path.resolve())], env=env, cwd=checkout, capture_output=True, text=True
        )
    if done.returncode != 0:
        print(f"no depth: {done.stderr.strip()[-500:]}", file=sys.stderr)
        return None
    file, depth = json.loads(done.stdout.splitlines()[-1])
    if not Path(file).resolve().is_relative_to(checkout):
        print(f"no depth: {python} runs the flashrt of {Path(file).parents[1]}", file=sys.stderr)
        return None
    return int(depth) if depth else None


def make_pack(path: Path) -> Path:
    from flashrt_kernels.rows import Codec
    from tools.make_synthetic_pack import PRESETS, make

    make(path, "tiny", PRESETS["tiny"], Codec.INT8)
    return path


if __name__ == "__main__":
    main()
