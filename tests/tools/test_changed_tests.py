"""Which tests belong to a change."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools.changed_tests import SMOKE, changed_files, mirror_of, without_those_inside

ROOT = Path(__file__).parents[2]
TREE = ("a/test_one.py", "a/test_two.py", "a/b/test_three.py", "kernels/test_glu.py", "tools/test_plot.py")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in TREE:
        path = tmp_path / "tests" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path


@pytest.mark.parametrize(
    ("source", "tests"),
    [
        ("flashrt/a/one.py", "tests/a/test_one.py"),
        ("flashrt/a/b/two.py", "tests/a/test_two.py"),
        ("flashrt/a/b/other.py", "tests/a/b"),
        ("flashrt/a/c/other.cpp", "tests/a"),
        ("flashrt/spec.py", None),
        ("flashrt/c/other.py", None),
        ("kernels/flashrt_kernels/cpu/glu.cpp", "tests/kernels/test_glu.py"),
        ("kernels/flashrt_kernels/ops.py", "tests/kernels"),
        ("tools/plot.py", "tests/tools/test_plot.py"),
        ("tests/a/test_two.py", "tests/a/test_two.py"),
        ("tests/a/test_that_is_gone.py", None),
        ("tests/a/support.py", "tests/a"),
        ("tests/families.py", None),
        ("README.md", None),
    ],
)
def test_a_source_has_the_tests_that_mirror_it(root: Path, source: str, tests: str | None) -> None:
    assert mirror_of(source, root) == tests


def test_what_lies_in_a_chosen_folder_is_not_named_again() -> None:
    assert without_those_inside(["t/b/c.py", "t/a", "t/b", "t/bc.py", "t/a"]) == ["t/a", "t/b", "t/bc.py"]


def test_changes_are_those_of_the_branch_and_of_the_working_tree(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=n", "-c", "user.email=e", "-c", "init.defaultBranch=main")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    def commit(name: str) -> None:
        (tmp_path / name).write_text(name)
        git("add", name)
        git("commit", "-m", name)

    git("init")
    commit("before")
    commit("gone")
    git("checkout", "-b", "branch")
    commit("on the branch")
    git("checkout", "main")
    commit("on main")
    git("checkout", "branch")
    (tmp_path / "gone").unlink()
    (tmp_path / "new").touch()
    assert changed_files("main", tmp_path) == ["gone", "on the branch", "new"]
    with pytest.raises(subprocess.CalledProcessError):
        changed_files("nothing", tmp_path)


def test_command_line() -> None:
    command = [sys.executable, "tools/changed_tests.py", "--since"]
    done = subprocess.run([*command, "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    tests = [Path(line) for line in done.stdout.splitlines()]
    assert all((ROOT / path).exists() for path in tests)
    assert all(any(Path(smoke).is_relative_to(path) for path in tests) for smoke in SMOKE)
    done = subprocess.run([*command, "nothing"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "git knows no nothing" in done.stderr
