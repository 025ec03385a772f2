"""The interpreter takes much that the compiler does not; the compiler needs no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flashrt_kernels.rows import DTYPES, Codec

pytest.importorskip("triton", reason="triton is not installed")
MORE = [
    (75, Codec.INT4),
    (80, Codec.INT4),
    (120, Codec.INT4),
    *((90, codec) for codec in DTYPES if codec is not Codec.INT4),
]
CASES = [(90, Codec.INT4), *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)]


@pytest.mark.parametrize(("capability", "codec"), CASES)
def test_every_kernel_compiles(tmp_path: Path, capability: int, codec: Codec) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_for.py")), str(capability), codec.value],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = "copy_bias count_chosen count_free count_hits find gather partial place reduce split write_chosen"
    tokens = "append choose merge score segment weigh"
    assert set(done.stdout.split()) == {f"_{name}_kernel" for name in f"{rows} {tokens}".split()}
