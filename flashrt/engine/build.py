"""The one place that wires concrete parts into an engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from threading import Lock

import numpy as np

from flashrt.budget.ledger import Ledger
from flashrt.budget.plan import Plan
from flashrt.budget.planner import GIB, SLACK_BASE, ceil_gib
from flashrt.budget.working_set import working_set
from flashrt.cache.device import Device
from flashrt.cache.pages import RingPages
from flashrt.cache.weights import Weights
from flashrt.engine.engine import Engine
from flashrt.engine.runtime import Runtime
from flashrt.engine.spilling import open_spill
from flashrt.errors import BudgetError
from flashrt.kv.base import Kernels
from flashrt.kv.cache import open_cache
from flashrt.kv.cells import KvCells
from flashrt.kv.spill import Spill
from flashrt.machine.disk import DiskRoof
from flashrt.machine.process import resident_bytes
from flashrt.model.decoder import Decoder
from flashrt.model.ffn.choose import KINDS, Ffns, Kinds
from flashrt.model.workspace import Workspace
from flashrt.storage.names import default_cache
from flashrt.storage.pack import Pack
from flashrt.storage.reader import STAGING_BYTES, Reader
from flashrt.text.files import TOKENIZER
from flashrt.text.tokenizer import Tokenizer

Progress = Callable[[int, int], None]

# Bytes taken at the peak of loading for each byte of a compact tokenizer.json: 21.0 (Qwen2.5) and 22.2 (Gemma 3).
TOKENIZER_GROWTH = 21
LARGE_TOKENIZER = 32 << 20  # bytes of growth that are worth an estimate


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
    *,
    progress: Progress = lambda done, total: None,
    roof: DiskRoof | None = None,
    drafting: Engine | None = None,
    kinds: Kinds = KINDS,
    kv_dir: Path | None = None,
    behind: bool = False,
) -> Engine:
    """An engine for exactly this plan, loaded; with `behind`, its first pass computes layers as they arrive.

    `roof` says what reads cost, by which rows are read together.

    kinds: those of feed-forward blocks that its layers may be of; kv_dir: where keys and values lie that do not fit in
    memory, None takes the cache directory. Raises DiskError where there is no room for them.
    """
    began = time.perf_counter()
    spec, ledger = pack.spec, Ledger(the_plan.owners)
    curve = None if roof is None else roof.curve()
    reader = Reader(pack, ledger.allocate("embedding reads", (STAGING_BYTES,), np.uint8), curve)
    with ExitStack() as on_error:
        on_error.callback(reader.close)
        device = runtime.device(pack, the_plan, ledger, reader)
        weights = Weights(pack, the_plan, device, reader)
        on_error.callback(weights.stop_loading)
        shapes = working_set(spec, pack.layout, the_plan.prefill_chunk, the_plan.logit_rows, the_plan.scoring)
        buffers = {
            name: device.allocate("activations", (shape.count,), np.uint8 if shape.item_bytes == 1 else np.float32)
            for name, shape in shapes.items()
        }
        limits, choices = the_plan.kv_limits, the_plan.choices
        needed = runtime.scratch_bytes(pack, the_plan.prefill_chunk, the_plan.context)
        scratch = device.scratch(max(needed, runtime.kv_scratch_bytes(pack, limits, choices)))
        pages = None
        if the_plan.far is not None:
            spill = open_spill(kv_dir or default_cache(), the_plan.far, device, reader)
            on_error.callback(spill.close)
            pages = RingPages(spill, weights.ring, _cells(spill, the_plan, device))
        kernels = Kernels(device.ops, scratch, None if pages is None else pages.open)
        allocate = partial(device.allocate, "KV")
        kv, *others = (
            open_cache(spec, limits, kernels, allocate, runtime.kv_kinds, choices) for _ in range(the_plan.sequences)
        )
        arrived = _counting(progress, the_plan.pinned_bytes)
        weights.load(arrived)
        if pack.sources and not the_plan.pins_all(pack.layout):
            weights.finish_loading()  # it takes the reader's staging, which what streams takes from now on
        work = Workspace(weights, buffers, scratch)
        ffns = Ffns(work, kinds)
        ffns.load(arrived)
        shared = bool(pack.sources) and pages is not None  # the reader's staging, with what is read of keys and values
        if shared or not (behind and runtime.bounds_process):
            weights.finish_loading()
        device.cache_on_host(weights.streamed(pack.layout.tensors))
        decoder = Decoder(work, ffns, pages)
        load_s = time.perf_counter() - began
        on_error.pop_all()
    return Engine(
        decoder, kv, reader, the_plan, tokenizer, runtime, roof=roof, load_s=load_s, drafting=drafting, others=others
    )


def _cells(spill: Spill, the_plan: Plan, device: Device) -> KvCells | None:
    """The cache of cells that tokens choose of pages."""
    if not the_plan.kv_cells:
        return None
    return KvCells(spill, the_plan.kv_cells, partial(device.allocate, "KV cells"))


def _counting(progress: Progress, total: int) -> Callable[[int], None]:
    """Adds up what arrives, for `progress`."""
    done, lock = 0, Lock()

    def arrived(nbytes: int) -> None:
        nonlocal done
        with lock:  # pinned blocks and those of FFN kinds may arrive side by side
            done += nbytes
            progress(done, total)

    return arrived
