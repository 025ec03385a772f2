"""The engine on a real GPU, with nothing but torch: any budget gives the same tokens, and the budget holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashrt.budget.planner import GIB
from flashrt.engine.open import load
from flashrt_kernels.rows import DTYPES, Codec
from tools.make_synthetic_pack import PRESETS, make

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _gpu() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.mark.parametrize("codec", DTYPES)
def test_a_streamed_model_says_what_a_resident_one_says(tmp_path: Path, codec: Codec) -> None:
    make(tmp_path / "p", "tiny", PRESETS["tiny"], codec)

    def tokens(budget_gb: float | None) -> tuple[list[int], float, int, int]:
        with load(tmp_path / "p", budget_gb, context=128, device="cuda", cache_dir=tmp_path) as engine:
            generation = engine.generate("any text will do", max_new_tokens=24)
            ids = [token.id for token in generation]
            report = generation.report
            return ids, report.bytes_read_per_token, report.budget_bytes, report.device_peak_bytes or 0

    resident, read, budget, peak = tokens(None)
    assert len(resident) == 24
    assert read == 0
    assert 0 < peak <= budget
    with load(tmp_path / "p", None, context=128, device="cuda", cache_dir=tmp_path) as engine:
        weights = engine.plan.weight_bytes
    less = (budget - weights // 2) / GIB
    streamed, _, budget, peak = tokens(less)
    assert streamed == resident
    assert 0 < peak <= budget
