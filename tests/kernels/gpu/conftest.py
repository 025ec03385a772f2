"""Where the GPU kernels run: through Triton's interpreter on CPU tensors, or on a GPU where there is one."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: it decides what its decorators make


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Runs the test through the interpreter, and on a GPU; a process can do one of the two."""
    if (request.param == "cuda") != torch.cuda.is_available():
        pytest.skip("no CUDA device" if request.param == "cuda" else "kernels are compiled where there is a GPU")
    return str(request.param)


@pytest.fixture
def cuda() -> str:
    """For sizes that the interpreter is too slow for."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return "cuda"
