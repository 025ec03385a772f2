"""Real GGUF files, read whole in bounded memory. Needs FLASHRT_MODELS (a directory)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.text.test_real_tokenizers import GEMMA, QWEN, model_path

pytestmark = pytest.mark.slow

SCRIPT = """
import sys
import numpy as np
from flashrt.storage.sources import open_checkpoint
CHUNK = 32 << 20
with open_checkpoint(sys.argv[1]) as c:
    c.validate()
    spec, total = c.spec, 0
    matrices = spec.shared_matrices()
    for i in range(len(spec.layers)):
        matrices |= spec.layer_matrices(i)
    for key in spec.vectors():
        assert np.isfinite(c.vector(key)).all()
    for key, (rows, columns) in matrices.items():
        step = CHUNK // (4 * columns)
        for start in range(0, rows, step):
            values = c.matrix_rows(key, start, min(start + step, rows))
            assert np.isfinite(values).all() and 1e-3 < np.abs(values).max() < 100
            total += values.size
    for i, layer in enumerate(spec.layers):
        step = CHUNK // (12 * spec.hidden)
        for start in range(0, layer.ffn.neurons, step):
            for values in c.neuron_rows(f"{i}.ffn", 0, start, min(start + step, layer.ffn.neurons)):
                assert np.isfinite(values).all() and 1e-3 < np.abs(values).max() < 100
                total += values.size
    assert total == spec.parameters
# Not ru_maxrss: a child inherits its parent's.
print(next(int(line.split()[1]) // 1024 for line in open('/proc/self/status') if line.startswith('VmHWM')))
"""


@pytest.mark.parametrize("name", [QWEN, GEMMA])
def test_reading_everything_stays_small(name: str) -> None:
    path = model_path(name)
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path)], cwd=root, capture_output=True, text=True, check=True
    )
    assert int(run.stdout) < 300
