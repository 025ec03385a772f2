"""The one place that wires concrete parts into an engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from flashrt.budget.ledger import Ledger
from flashrt.budget.planner import (
    GIB,
    SLACK_BASE,
    FixedCosts,
    Plan,
    Workload,
    ceil_gib,
    plan,
    resident_budget,
    smallest_budget,
)
from flashrt.budget.process import reset_peak, resident_bytes
from flashrt.budget.profile import DiskProfile, DiskRoof, load_disk_profile, measure_disk, save_disk_profile
from flashrt.budget.working_set import working_set
from flashrt.cache.weights import Weights
from flashrt.config import budget_bytes
from flashrt.engine.engine import Engine
from flashrt.engine.runtime import Runtime, kv_item_bytes
from flashrt.errors import BudgetError
from flashrt.kv.contiguous import KVCache
from flashrt.model.decoder import Decoder
from flashrt.model.ffn.choose import KINDS, Ffns, Kinds
from flashrt.model.workspace import Workspace
from flashrt.spec import ModelSpec
from flashrt.storage.cost import CostCurve
from flashrt.storage.pack import Pack
from flashrt.storage.reader import CHUNK_BYTES, STAGING_BYTES, Reader
from flashrt.text.files import TOKENIZER
from flashrt.text.tokenizer import Tokenizer

Progress = Callable[[int, int], None]

DEFAULT_CONTEXT = 4096
# Bytes taken at the peak of loading for each byte of a compact tokenizer.json: 21.0 (Qwen2.5) and 22.2 (Gemma 3).
TOKENIZER_GROWTH = 21
LARGE_TOKENIZER = 32 << 20  # bytes of growth that are worth an estimate
AUTO_DRAFT_TOKENS = 12  # tokens of a pass with a draft: logits for more take memory that weights could have
AVAILABLE_SHARE = 0.85  # of what is available that is used when no budget is given


class LoadedPack:
    """An opened pack and all that a plan depends on: what `flashrt plan` and `flashrt run` have in common.

    The process is measured when a plan is made: by then everything but the model is loaded, prompts included.
    """

    def __init__(self, path: Path | str, cache: Path, runtime: Runtime, budget_gb: float | None = None) -> None:
        """Raises BudgetError when the budget cannot even hold the tokenizer while it is loaded."""
        self.pack, self.cache, self.runtime = Pack(path), cache, runtime
        self.budget = None if budget_gb is None else budget_bytes(budget_gb)
        if self.budget is not None and runtime.bounds_process:
            check_start(self.pack, self.budget)
        reset_peak()  # what the process was before is no concern of this budget
        self.tokenizer = load_tokenizer(self.pack)

    @property
    def spec(self) -> ModelSpec:
        return self.pack.spec

    def plan(self, workload: Workload) -> Plan:
        """Plan the budget; without one, all that the model needs or that the machine has."""
        arguments = (self.spec, self.pack.layout)
        costs = self._fixed_costs()
        if self.budget is not None:
            return plan(*arguments, self.budget, workload, costs)
        enough = resident_budget(*arguments, workload, costs)
        available = int(AVAILABLE_SHARE * self.runtime.available())
        return plan(*arguments, min(enough, available), workload, costs)

    def drafting(self, workload: Workload, max_draft_tokens: int | None) -> Workload:
        """A workload whose passes verify drafts of up to so many tokens; None: where that may pay, and there is room.

        On a GPU a pass of several tokens rounds otherwise than one of one, so it only drafts when it is told to.
        """
        if max_draft_tokens is not None:
            return replace(workload, max_draft_tokens=max_draft_tokens)
        drafting = replace(workload, max_draft_tokens=AUTO_DRAFT_TOKENS)
        fits = self.budget is None or self.smallest_budget(drafting) <= self.budget
        return drafting if fits and self.runtime.bounds_process else workload

    def exact_plan(self, path: Path, workload: Workload) -> Plan:
        """What the plan would be for the pack at `path`, which this calibrated one was made of.

        Where the budget does not even hold that one, its smallest is planned for.
        """
        arguments = (self.spec, Pack(path).layout)
        costs = self._fixed_costs()
        enough = resident_budget(*arguments, workload, costs)
        smallest = smallest_budget(*arguments, workload, costs)
        return plan(*arguments, max(smallest, enough if self.budget is None else self.budget), workload, costs)

    def _fixed_costs(self) -> FixedCosts:
        return self.runtime.fixed_costs(self.pack)

    def read_seconds(self, the_plan: Plan) -> float | None:
        """What a token's reads take under a plan, by what is known of the disk; None where nothing is known.

        Each row is a read of its own, so it costs more than its bytes.
        """
        known = load_disk_profile(self.cache, self.disk_number)
        curve = None if known is None else known.curve()
        if curve is None:
            return None
        rows, row_bytes = the_plan.scattered_reads_per_token, the_plan.scattered_bytes_per_token
        blocks = the_plan.streamed_bytes_per_token - row_bytes
        whole = curve.seconds(CHUNK_BYTES) / CHUNK_BYTES
        return blocks * whole + (rows * curve.seconds(int(row_bytes / rows)) if row_bytes else 0.0)

    def smallest_budget(self, workload: Workload) -> int:
        """Bytes of the smallest budget that `plan` accepts."""
        return smallest_budget(self.spec, self.pack.layout, workload, self._fixed_costs())

    def engine(self, the_plan: Plan, progress: Progress = lambda done, total: None) -> Engine:
        """Allocate what the plan says, load what it pins, and return an engine."""
        disk = None if the_plan.resident else self.disk()
        began = time.perf_counter()
        # Taken now: to measure beside a loaded model takes memory that is not planned, and reads that disturb.
        curve = None if disk is None else disk.curve()
        engine = build_engine(self.pack, the_plan, self.tokenizer, self.runtime, progress, curve)
        engine.load_s = time.perf_counter() - began
        engine.roof = None if disk is None else DiskRoof(self.cache, self.disk_number, disk)
        return engine

    @property
    def disk_number(self) -> int:
        """The device number under which the pack's disk is known."""
        return self.pack.path.stat().st_dev

    def disk(self) -> DiskProfile | None:
        """What the disk that holds the pack can do: measured once, then taken from the cache.

        None when nothing is known and the pack is too small to measure with.
        """
        known = load_disk_profile(self.cache, self.disk_number)
        if known is not None and known.curve() is not None:
            return known
        measured = measure_disk(self.pack.largest_file)
        if measured is not None:
            save_disk_profile(self.cache, self.disk_number, measured)
        return measured or known


def check_start(pack: Pack, budget: int) -> None:
    """Refuse a budget that loading a large tokenizer would exceed, before the kernel does. Raises BudgetError.

    An estimate, a little below what is measured afterwards; where the tokenizer is small, the plan says it better.
    """
    growth = TOKENIZER_GROWTH * (pack.path / TOKENIZER).stat().st_size
    needed = resident_bytes() + growth + SLACK_BASE
    if budget < needed and growth > LARGE_TOKENIZER:
        raise BudgetError(
            f"a budget of {budget / GIB:.3f} GiB is too small to load the program and the tokenizer: "
            f"the smallest that would do is {ceil_gib(int(1.2 * needed)):.3f} GiB, and more for a long context. "
            "Use a larger --budget-gb"
        )


def load_tokenizer(pack: Pack) -> Tokenizer:
    """The tokenizer that a pack carries, its files checked against the manifest."""
    for name in pack.manifest.text_files:
        pack.check_text(name)
    return Tokenizer.from_files(pack.path)


def build_engine(
    pack: Pack,
    the_plan: Plan,
    tokenizer: Tokenizer,
    runtime: Runtime,
    progress: Progress = lambda done, total: None,
    curve: CostCurve | None = None,
    kinds: Kinds = KINDS,
) -> Engine:
    """An engine for exactly this plan, loaded. `curve` says what reads cost, by which rows are read together.

    kinds: those of feed-forward blocks that its layers may be of.
    """
    spec, ledger = pack.spec, Ledger(the_plan.owners)
    reader = Reader(pack, ledger.allocate("embedding reads", (STAGING_BYTES,), np.uint8), curve)
    try:
        device = runtime.device(pack, the_plan, ledger, reader)
        weights = Weights(pack, the_plan, device, reader)
        kv_type = np.float32 if kv_item_bytes(pack) == 4 else np.uint16
        kv = KVCache(spec, the_plan.context, lambda shape: device.allocate("KV", shape, kv_type))
        codec = pack.layout.tensors["embed"].codec
        columns = pack.layout.channel_columns
        shapes = working_set(spec, codec, the_plan.prefill_chunk, the_plan.logit_rows, the_plan.scoring, columns)
        buffers = {
            name: device.allocate("activations", (shape.count,), np.uint8 if shape.item_bytes == 1 else np.float32)
            for name, shape in shapes.items()
        }
        scratch = device.scratch(runtime.scratch_bytes(pack, the_plan.prefill_chunk, the_plan.context))
        arrived = _counting(progress, the_plan.pinned_bytes)
        weights.load(arrived)
        work = Workspace(weights, buffers, scratch)
        ffns = Ffns(work, kinds)
        ffns.load(arrived)
        device.cache_on_host(weights.streamed(pack.layout.tensors))
        return Engine(Decoder(work, kv, ffns), reader, the_plan, tokenizer, runtime)
    except BaseException:
        reader.close()
        raise


def _counting(progress: Progress, total: int) -> Callable[[int], None]:
    """Adds up what arrives, for `progress`."""
    done = 0

    def arrived(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    return arrived
