"""The first promise, measured: a run stays within its budget, and uses it.

Each run is a process of its own inside a memory cgroup limited to exactly the budget, without swap. Where no cgroup can
be made, the kernel's high-water mark of the process is compared alone, and a warning says so. That mark is read from
outside; what flashrt reports of itself is only compared with it.
"""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashrt.calibration.channel_pack import ChannelPackSource
from flashrt.calibration.fit_channels import ChannelFit
from flashrt.calibration.fit_rows import RowFit
from flashrt.calibration.row_pack import RowPackSource
from flashrt.engine.runtime import runtime_for
from flashrt.model.predictors.low_rank import Factors
from flashrt.sparsity import ChannelSparsity, RowSparsity, Sparsity
from flashrt.storage.kv_labels import write_labels
from flashrt.storage.manifest import SPARSE_DIR
from flashrt.storage.pack import Pack
from flashrt.storage.packer import pack
from flashrt_kernels.rows import Codec
from tools.make_synthetic_pack import PRESETS, SyntheticSource, TiledEncoder, make, random_labels
from tools.run_in_cgroup import Result, run_limited

pytestmark = pytest.mark.budget

GIB = 1 << 30
ROOT = Path(__file__).parents[2]
SHAPE = replace(PRESETS["llama-2-7b"], hidden=2048, layers=8, heads=16, kv_heads=4, neurons=5632)
PROMPT = "The budget holds."
USED = 0.85  # of the budget, at least, when the model is larger


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About half a GiB of random weights."""
    path = tmp_path_factory.mktemp("memory") / "int8.pack"
    make(path, "half a GiB", SHAPE, Codec.INT8)
    assert Pack(path).layout.nbytes > 0.4 * GIB
    return path


@pytest.fixture(scope="module")
def thinned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An int4 model whose calibrated pack leaves out about half, by thresholds that nobody fitted."""
    path = tmp_path_factory.mktemp("memory") / "int4.pack"
    make(path, "a thinned model", SHAPE, Codec.INT4)
    base = Pack(path)
    places = np.arange(base.spec.hidden, dtype=np.int32)
    norms = np.ones(base.spec.hidden, np.float32), np.ones(SHAPE.neurons, np.float32)
    layers = tuple(ChannelSparsity(20, 0.4, 0.8, 0.05) for _ in base.spec.layers)
    source = ChannelPackSource(base, lambda i: ChannelFit(places, *norms, [], []), layers)
    sparsity = Sparsity(base.manifest.hash, 0.02, 0.02, layers)
    pack(source, path / SPARSE_DIR, Codec.INT4, encoder=source, sparsity=sparsity)
    return path


@pytest.fixture(scope="module")
def predicted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An int4 ReLU model whose calibrated pack names about a fifth of the neurons, by predictors that nobody fitted."""
    path = tmp_path_factory.mktemp("memory") / "relu.pack"
    spec = SHAPE.spec()
    layer = replace(spec.layers[0], ffn=replace(spec.layers[0].ffn, activation="relu"))
    synthetic = SyntheticSource("a predicted model", replace(spec, layers=(layer,) * len(spec.layers)), 0)
    pack(synthetic, path, Codec.INT4, encoder=TiledEncoder(synthetic))
    base, rank, draw = Pack(path), 64, np.random.default_rng(0)
    down, up = (draw.standard_normal(s).astype(np.float32) for s in ((rank, spec.hidden), (SHAPE.neurons, rank)))
    order, bias = np.arange(SHAPE.neurons, dtype=np.int32), np.full(SHAPE.neurons, -300, np.float32)
    source = RowPackSource(base, lambda i: RowFit(order, Factors(down, up, bias), [], []), runtime_for("cpu", 1).ops)
    layers = (RowSparsity(rank, 0.0, (1200.0, 600.0, 0.0)),) * len(spec.layers)
    sparsity = Sparsity(base.manifest.hash, 0.02, 0.02, layers)
    pack(source, path / SPARSE_DIR, Codec.INT4, encoder=source, sparsity=sparsity)
    return path


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = replace(SHAPE, layers=4, neurons=1100, experts=8, experts_per_token=2)
    path = tmp_path_factory.mktemp("memory") / "mixture.pack"
    make(path, "a mixture", shape, Codec.INT4)
    return path


def run(
    pack: Path,
    budget_gb: float,
    cache: Path,
    context: int = 256,
    prompt: str = PROMPT,
    limit_gb: float | None = None,
    *options: str,
) -> tuple[Result, Any]:
    """Run within a cgroup of `limit_gb` GiB, by default of exactly the budget."""
    command = [sys.executable, "-m", "flashrt", "run", str(pack), "--json", "--cache-dir", str(cache)]
    command += ["--budget-gb", str(budget_gb), "--context", str(context), "--prompt", prompt, "-n", "6"]
    command += options
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": "/usr/bin:/bin"}
    result = run_limited(command, int((limit_gb or budget_gb) * GIB), env=env, timeout=120)
    if not result.limited:
        warnings.warn(f"peak memory was sampled, not limited: {result.why_not}", stacklevel=2)
    return result, json.loads(result.stdout.splitlines()[-1]) if result.stdout.strip() else None


def check(result: Result, report: Any, budget_gb: float) -> None:
    assert not result.oom_killed, result.stderr
    assert result.returncode == 0, result.stderr
    budget = int(budget_gb * GIB)
    assert report["budget_bytes"] == budget
    assert result.peak_rss_bytes <= budget
    assert result.peak_rss_bytes >= USED * budget, "an idle budget is a defect too"
    assert report["peak_rss_bytes"] == pytest.approx(result.peak_rss_bytes, rel=0.01)
    assert report["bytes_read_per_token"] > 0


@pytest.mark.parametrize("context", [64, 4096])
@pytest.mark.parametrize("budget_gb", [0.25, 0.4])
def test_a_model_larger_than_its_budget(model: Path, tmp_path: Path, budget_gb: float, context: int) -> None:
    result, report = run(model, budget_gb, tmp_path, context)
    check(result, report, budget_gb)


@pytest.mark.parametrize(("budget_gb", "cached"), [(0.11, False), (0.2, True), (0.25, True)])
def test_a_mixture_larger_than_its_budget(mixture: Path, tmp_path: Path, budget_gb: float, cached: bool) -> None:
    """With experts in slots, and with too little memory for that."""
    result, report = run(mixture, budget_gb, tmp_path)
    check(result, report, budget_gb)
    assert (report["plan"]["expert_slots"] > 0) == cached
    assert (report["expert_cache"] is not None) == cached


def test_a_mixtures_tokens_do_not_depend_on_the_budget(mixture: Path, tmp_path: Path) -> None:
    tokens = [run(mixture, budget_gb, tmp_path)[1]["token_ids"] for budget_gb in (0.11, 0.2, 1.0)]
    assert tokens[0] == tokens[1] == tokens[2]


@pytest.mark.parametrize("budget_gb", [0.15, 0.2])
def test_sparse_mode(thinned: Path, tmp_path: Path, budget_gb: float) -> None:
    result, report = run(thinned, budget_gb, tmp_path, 256, PROMPT, None, "--mode", "sparse")
    check(result, report, budget_gb)
    assert 0.1 < report["ffn_bytes_share"] < 0.9
    result, report = run(thinned, budget_gb, tmp_path, 700, PROMPT * 30, None, "--mode", "sparse")
    check(result, report, budget_gb)


@pytest.mark.parametrize("budget_gb", [0.15, 0.2])
def test_rows_that_are_predicted(predicted: Path, tmp_path: Path, budget_gb: float) -> None:
    for context, prompt in ((256, PROMPT), (700, PROMPT * 30)):
        result, report = run(predicted, budget_gb, tmp_path, context, prompt, None, "--mode", "sparse")
        check(result, report, budget_gb)
        assert 0.05 < report["ffn_rows_share"] < 0.6
        assert report["row_hit_rate"] < 1


def test_a_long_prompt(model: Path, tmp_path: Path) -> None:
    result, report = run(model, 0.3, tmp_path, 700, PROMPT * 30)
    check(result, report, 0.3)


@pytest.mark.parametrize("budget_gb", [pytest.param(0.115, marks=pytest.mark.slow), 0.12])
def test_keys_and_values_larger_than_what_is_left(model: Path, tmp_path: Path, budget_gb: float) -> None:
    """A prompt of about 1,800 tokens, most of whose keys and values are on disk; nothing is left there."""
    result, report = run(model, budget_gb, tmp_path, 4096, PROMPT * 100)
    check(result, report, budget_gb)
    assert report["prompt_tokens"] > 1500
    assert report["plan"]["kv_disk_bytes"] > 2 * report["plan"]["kv_bytes"] > 0
    assert report["bytes_read_per_token"] > report["plan"]["streamed_bytes_per_token"] - report["plan"]["kv_disk_bytes"]
    assert not list(tmp_path.rglob("flashrt-kv-*"))


@pytest.mark.parametrize("budget_gb", [0.13, 0.2])
def test_keys_and_values_that_are_chosen_on_disk(model: Path, tmp_path: Path, budget_gb: float) -> None:
    base = Pack(model)
    write_labels(model, random_labels(base, 0), base.spec)
    result, report = run(model, budget_gb, tmp_path, 4096, PROMPT * 100, None, "--kv", "sparse")
    check(result, report, budget_gb)
    assert report["plan"]["kv_disk_bytes"] > 2 * report["plan"]["kv_bytes"] > 0
    assert report["kv"]["cells"] > 8 * 4 * 5 * 256 / 8  # of what is chosen, a part lies on disk
    assert report["kv"]["bytes_read"] > 0
    assert not list(tmp_path.rglob("flashrt-kv-*"))


def test_the_tokens_do_not_depend_on_the_budget(model: Path, tmp_path: Path) -> None:
    tokens = {}
    for budget_gb in (0.2, 0.35, 2.0):
        result, report = run(model, budget_gb, tmp_path)
        assert result.returncode == 0, result.stderr
        tokens[budget_gb] = report["token_ids"]
        if budget_gb == 2.0:
            assert report["bytes_read_per_token"] == 0
    assert tokens[0.2] == tokens[0.35] == tokens[2.0]


def test_the_smallest_budget_that_is_named_suffices(model: Path, tmp_path: Path) -> None:
    refused, _ = run(model, 0.01, tmp_path, 1024, limit_gb=1)
    assert refused.returncode != 0
    assert "Traceback" not in refused.stderr
    named = float(refused.stderr.partition("the smallest that would do is ")[2].split()[0])
    result, _ = run(model, named, tmp_path, 1024)
    assert result.returncode == 0, result.stderr
    assert not result.oom_killed
    assert result.peak_rss_bytes <= int(named * GIB)
    again, _ = run(model, round(0.95 * named, 3), tmp_path, 1024, limit_gb=1)
    assert again.returncode != 0
    assert "the smallest that would do is" in again.stderr
