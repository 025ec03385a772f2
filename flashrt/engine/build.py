"""The one place that wires concrete parts into an engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from flashrt.budget.ledger import Ledger
from flashrt.budget.planner import Machine, Plan, Workload, plan, resident_budget
from flashrt.budget.process import (
    available_bytes,
    peak_resident_bytes,
    release_free_memory,
    resident_bytes,
    usable_cores,
)
from flashrt.budget.profile import DiskProfile, load_disk_profile, save_disk_profile, sequential_rate
from flashrt.budget.working_set import working_set
from flashrt.cache.kv import KVCache
from flashrt.cache.weights import Weights
from flashrt.config import budget_bytes
from flashrt.engine.engine import Engine
from flashrt.model.decoder import Decoder
from flashrt.spec import ModelSpec
from flashrt.storage.pack import Pack
from flashrt.storage.reader import Reader
from flashrt.text.tokenizer import Tokenizer
from flashrt_kernels import ops
from flashrt_kernels.rows import Codec

Progress = Callable[[int, int], None]

DEFAULT_CONTEXT = 4096
RUNTIME_GROWTH = 4 << 20  # what the interpreter still takes after it was measured: reports, text, block lists
AVAILABLE_SHARE = 0.85  # of the machine's free memory that is used when no budget is given


class Prepared:
    """An opened pack and all that a plan depends on: what `flashrt plan` and `flashrt run` have in common.

    The process is measured once everything but the model is loaded, so that both see the same figure.
    """

    def __init__(self, path: Path | str, cache: Path, threads: int | None = None) -> None:
        self.pack = Pack(path)
        self.cache = cache
        self.ops = ops.load("cpu")
        self.ops.set_threads(threads or usable_cores())
        self.tokenizer = Tokenizer.from_files(self.pack.read_text)
        release_free_memory()
        self._runtime = resident_bytes() + RUNTIME_GROWTH
        self._peak = peak_resident_bytes()

    @property
    def spec(self) -> ModelSpec:
        return self.pack.spec

    def machine(self) -> Machine:
        exact = self.pack.manifest.dtype is Codec.F32
        return Machine(self._runtime, self._peak, 4 if exact else 2, self._scratch_bytes)

    def plan(self, budget_gb: float | None, workload: Workload) -> Plan:
        """Plan the budget; without one, all that the model needs or that the machine has."""
        machine = self.machine()
        if budget_gb is not None:
            budget = budget_bytes(budget_gb)
        else:
            enough = resident_budget(self.spec, self.pack.layout, workload, machine)
            budget = min(enough, int(AVAILABLE_SHARE * available_bytes()) + self._runtime)
        return plan(self.spec, self.pack.layout, budget, workload, machine)

    def engine(self, the_plan: Plan, progress: Progress = lambda done, total: None) -> Engine:
        """Allocate what the plan says, load what it pins, and return an engine."""
        began = time.perf_counter()
        disk_rate = None if the_plan.resident else self._disk_rate()
        engine = build_engine(self.pack, the_plan, self.tokenizer, self.ops, progress, disk_rate)
        engine.load_s = time.perf_counter() - began
        return engine

    def _scratch_bytes(self, tokens: int) -> int:
        return int(self.ops.scratch_bytes(self.spec, tokens))

    def _disk_rate(self) -> float:
        """The measured sequential rate of the disk that holds the pack."""
        device = self.pack.path.stat().st_dev
        known = load_disk_profile(self.cache, device)
        if known is None:
            files = self.pack.layout.file_bytes
            known = DiskProfile(sequential_rate(self.pack.path / max(files, key=lambda name: files[name])))
            save_disk_profile(self.cache, device, known)
        return known.sequential


def build_engine(
    pack: Pack,
    the_plan: Plan,
    tokenizer: Tokenizer,
    kernels: ops.Ops,
    progress: Progress = lambda done, total: None,
    disk_rate: float | None = None,
) -> Engine:
    """An engine for exactly this plan."""
    spec, ledger = pack.spec, Ledger(the_plan.owners)
    reader = Reader(pack)
    try:
        weights = Weights(pack, the_plan, ledger, reader)
        kv_type = np.float32 if pack.manifest.dtype is Codec.F32 else np.uint16
        kv = KVCache(spec, the_plan.context, lambda shape: ledger.allocate("KV", shape, kv_type))
        shapes = working_set(
            spec, pack.layout.tensors["embed"].codec, the_plan.chunk, the_plan.logit_rows, the_plan.scoring
        )
        buffers = {
            name: ledger.allocate("activations", (shape.count,), np.uint8 if shape.item_bytes == 1 else np.float32)
            for name, shape in shapes.items()
        }
        scratch = ledger.allocate("activations", (kernels.scratch_bytes(spec, the_plan.chunk),), np.uint8)
        weights.load(progress)
        return Engine(Decoder(weights, kv, buffers, scratch, kernels), reader, the_plan, tokenizer, disk_rate=disk_rate)
    except BaseException:
        reader.close()
        raise
