import inspect
import subprocess
import sys

import pytest

from flashrt_kernels import ops


@pytest.mark.parametrize("backend", ops.BACKENDS)
@pytest.mark.parametrize("name", [name for name in vars(ops.Ops) if not name.startswith("_")])
def test_backends_have_the_same_operations(backend, name):
    expected = inspect.signature(getattr(ops.Ops, name)).parameters
    found = inspect.signature(getattr(ops.load(backend), name)).parameters
    assert ["self", *found] == list(expected)


def test_unknown_backend_is_refused():
    with pytest.raises(ops.BackendUnavailable, match="expected one of cpu, torch"):
        ops.load("tpu")


def test_missing_extension_is_refused_with_a_remedy(monkeypatch):
    monkeypatch.delitem(sys.modules, "flashrt_kernels.cpu", raising=False)
    monkeypatch.setitem(sys.modules, "flashrt_kernels.cpu._cpu", None)
    with pytest.raises(ops.BackendUnavailable, match="pip install"):
        ops.load("cpu")


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("flashrt_kernels.rows", {"torch", "numpy", "flashrt_kernels.cpu"}),
        ("flashrt_kernels.ops", {"torch", "numpy", "flashrt_kernels.cpu"}),
        ("flashrt_kernels.cpu", {"torch", "flashrt_kernels.reference", "flashrt"}),
        ("flashrt_kernels.reference", {"flashrt_kernels.cpu", "flashrt"}),
    ],
)
def test_imports(module, forbidden):
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not forbidden & set(loaded)
