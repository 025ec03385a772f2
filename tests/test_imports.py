"""Who may import whom, and what nobody may import early."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "flashrt": ROOT / "flashrt",
    "flashrt_kernels": ROOT / "kernels" / "flashrt_kernels",
    "tools": ROOT / "tools",
}

# Higher layers may import lower ones and their own; `flashrt` is the package's own front.
LAYERS = (
    ("tools", "flashrt.__main__"),
    ("flashrt.cli",),
    ("flashrt.batch",),
    ("flashrt.server", "flashrt.integrations"),
    ("flashrt",),
    ("flashrt.calibration",),
    ("flashrt.engine",),
    ("flashrt.model",),
    ("flashrt.cache", "flashrt.speculate", "flashrt.machine", "flashrt.checkpoints"),
    ("flashrt.budget", "flashrt.storage", "flashrt.arch", "flashrt.text", "flashrt.kv"),
    ("flashrt.labels",),
    ("flashrt.config", "flashrt.sparsity", "flashrt.spec", "flashrt.child"),
    ("flashrt.rope",),
    ("flashrt.errors",),
    ("flashrt_kernels",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
LATE = {"gguf", "huggingface_hub", "torch", "transformers", "triton"}  # costly: imported where used
# Imported only once torch is asked for; with all that they hold.
TORCH_MODULES = (
    "flashrt_kernels.reference",
    "flashrt_kernels.gpu",
    "flashrt.cache.torch_device",
    "flashrt.integrations.transformers",
)


def modules() -> Iterator[tuple[str, Path]]:
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imported(tree: ast.AST) -> Iterator[str]:
    """Names that importing or running `tree` imports; those for type checkers alone do not count."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from imported(node)


def at_import(tree: ast.Module) -> Iterator[str]:
    """Names that importing the module imports: not those inside functions."""
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield from imported(ast.Module([node], []))


def layer_of(module: str) -> str | None:
    while module:
        if module in LEVEL:
            return module
        module = module.rpartition(".")[0]
    return None


MODULES = dict(modules())


def everything_imported(module: str) -> set[str]:
    """Modules that `module` names in any import, those for type checkers and those inside functions included."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return (found & MODULES.keys()) - {module}


def cycles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of modules that import one another, directly or not."""
    reached = {module: {module} for module in graph}
    for module in graph:
        waiting = [module]
        while waiting:
            new = graph[waiting.pop()] & graph.keys() - reached[module]
            reached[module] |= new
            waiting += new
    groups = [{other for other in reached[module] if module in reached[other]} for module in graph]
    return [group for group in groups if len(group) > 1]


@pytest.mark.parametrize("module", MODULES)
def test_layers(module: str) -> None:
    own = layer_of(module)
    assert own is not None, f"{module} belongs to no layer: say where in LAYERS"
    for name in imported(ast.parse(MODULES[module].read_text())):
        theirs = layer_of(name)
        if theirs is not None and theirs != own:
            assert LEVEL[own] < LEVEL[theirs] or (LEVEL[own] == LEVEL[theirs] == LEVEL["flashrt.storage"]), (
                f"{module} imports {name}, which lies above it"
            )


@pytest.mark.parametrize("module", MODULES)
def test_costly_packages_are_imported_late(module: str) -> None:
    if module.startswith(("tools", *TORCH_MODULES)):
        return
    early = set(at_import(ast.parse(MODULES[module].read_text())))
    assert not {name.partition(".")[0] for name in early} & LATE
    assert not [name for name in early if name.startswith(TORCH_MODULES)]


@pytest.mark.parametrize("package", sorted({module.rpartition(".")[0] for module in MODULES} - {""}))
def test_no_module_of_a_package_imports_in_a_circle(package: str) -> None:
    inside = {module for module in MODULES if module == package or module.startswith(f"{package}.")}
    assert cycles({module: everything_imported(module) & inside for module in inside}) == []


def test_circles_are_found() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}) == [{"a", "b", "c"}] * 3
    assert cycles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_kernels_know_nothing_of_flashrt() -> None:
    allowed = {"flashrt_kernels", "numpy", "torch", "triton", *sys.stdlib_module_names}
    for module, path in MODULES.items():
        if module.startswith("flashrt_kernels"):
            tops = {name.partition(".")[0] for name in imported(ast.parse(path.read_text()))}
            assert tops <= allowed, f"{module} imports {tops - allowed}"


@pytest.mark.parametrize("program", ["import flashrt", "import flashrt.cli", "import flashrt, flashrt.engine.build"])
def test_importing_is_cheap(program: str) -> None:
    report = f"{program}\nimport sys\nprint(*{LATE!r} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == []
