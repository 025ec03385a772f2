"""A pack that is open and ready to be planned and loaded."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from flashrt.budget.plan import FixedCosts, Plan, Workload
from flashrt.budget.planner import AHEAD, PEAK_JITTER, plan, resident_budget, smallest_budget
from flashrt.checkpoints.resolve import Progress as Stages
from flashrt.checkpoints.resolve import resolve
from flashrt.config import checked_context
from flashrt.engine.ahead_pack import ahead_bytes, ahead_pack, ahead_plan, load_ahead, pays
from flashrt.engine.build import Progress, build_engine, check_start, load_tokenizer
from flashrt.engine.draft import check_draft, load_draft
from flashrt.engine.engine import Engine
from flashrt.engine.options import LoadOptions
from flashrt.engine.packing import Packing
from flashrt.engine.runtime import Runtime
from flashrt.engine.sparse_kv import sparse_kv
from flashrt.errors import BudgetError, CheckpointWarning, PackError, UsageError
from flashrt.kv.choice import SparseKv
from flashrt.machine.disk import DiskProfile, DiskRoof, load_disk_profile, measure_disk, save_disk_profile
from flashrt.machine.process import reset_peak
from flashrt.spec import ModelSpec
from flashrt.storage.layout import PackLayout
from flashrt.storage.pack import Pack
from flashrt.storage.reader import CHUNK_BYTES
from flashrt.storage.room import free_bytes
from flashrt_kernels.kv import KvCodec

DEFAULT_CONTEXT = 4096
AUTO_DRAFT_TOKENS = 12  # tokens of a pass with a draft: logits for more take memory that weights could have
AVAILABLE_SHARE = 0.85  # of what is available that is used when no budget is given


class LoadedPack:
    """An opened pack and all that a plan depends on: what `flashrt plan` and `flashrt run` have in common.

    `exact` is the pack that a calibrated one was made of, otherwise the pack itself; `draft` a smaller model's.
    """

    def __init__(
        self,
        pack: Pack,
        options: LoadOptions,
        runtime: Runtime,
        *,
        exact: Pack | None = None,
        draft: Pack | None = None,
        kv: SparseKv | None = None,
        beside: int = 0,
    ) -> None:
        """`kv` says how decode passes choose what they attend to, in place of the options; `beside` are bytes of the
        budget that the caller takes itself.

        Raises BudgetError when the budget cannot even hold the tokenizer while it is loaded.
        """
        self.pack, self.options, self.runtime = pack, options, runtime
        self.exact, self.draft = exact or pack, draft
        self._kv, self._beside = kv, beside
        self.budget, self.cache = options.budget, options.cache
        if self.budget is not None and runtime.bounds_process:
            check_start(pack, self.budget)
        reset_peak()  # what the process was before is no concern of this budget
        self.tokenizer = load_tokenizer(pack)

    @property
    def spec(self) -> ModelSpec:
        return self.pack.spec

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together, where nothing else is known of them. Raises UsageError."""
        return checked_context(self.spec, self.options.context, DEFAULT_CONTEXT)

    @functools.cached_property
    def costs(self) -> FixedCosts:
        """What the process takes, measured once, for the first plan: by then everything but the model is loaded."""
        costs = self.runtime.fixed_costs(self.pack)
        codec = costs.kv_codec if self.options.kv_dtype is None else KvCodec(self.options.kv_dtype)
        if codec is KvCodec.INT4 and self.spec.latent:
            raise UsageError(
                f"--kv-dtype int4: values of this {self.spec.family} model are parts of its keys, which are not held "
                "in four bits: use int8"
            )
        return replace(costs, runtime_bytes=costs.runtime_bytes + self._beside, kv_codec=codec)

    @functools.cached_property
    def ahead(self) -> Pack | None:
        """The layer that predicts further tokens, where the pack holds one."""
        return ahead_pack(self.pack)

    @functools.cached_property
    def kv(self) -> SparseKv | None:
        """How decode passes choose what they attend to; see `sparse_kv`."""
        return self._kv or sparse_kv(self.exact, self.options, self.pack.manifest.sparsity)

    def plan(self, workload: Workload) -> Plan:
        """Plan the budget for `workload` and drafts; without one, all that the model needs or that the machine has."""
        return self._plan(self.pack.layout, workload)

    def packing(self, workload: Workload) -> Packing | None:
        """Of a GGUF file that is read itself, what packing it would give; None where everything is in memory.

        Raises BudgetError for a budget that is too small for a pack, too.
        """
        if not self.pack.sources:
            return None
        packed = self.pack.manifest.packed
        try:
            streaming = self.plan(workload)
        except BudgetError:
            streaming = None
        if streaming is not None and streaming.pins_all(self.pack.layout):
            return None
        return Packing.of(packed.nbytes, streaming, self._plan(packed, workload), free_bytes(self.cache))

    def _plan(self, layout: PackLayout, workload: Workload) -> Plan:
        workload = self._with_drafts(replace(workload, kv=self.kv))
        beside = self._with_ahead(workload)
        if beside is not None:
            with contextlib.suppress(BudgetError):
                if pays(found := self._divided(layout, beside), self.spec, layout):
                    return found
        return self._divided(layout, workload)

    def _divided(self, layout: PackLayout, workload: Workload) -> Plan:
        """The plan for just this workload."""
        arguments = (self.spec, layout)
        if self.budget is not None:
            return plan(*arguments, self.budget, workload, self.costs)
        enough = resident_budget(*arguments, workload, self.costs)
        available = int(AVAILABLE_SHARE * self.runtime.available())
        return plan(*arguments, min(enough, available), workload, self.costs)

    def exact_plan(self, workload: Workload) -> Plan:
        """What the plan would be for the pack that this calibrated one was made of.

        Where the budget does not even hold that one, its smallest is planned for.
        """
        arguments, workload = (self.spec, self.exact.layout), replace(workload, kv=self.kv)
        wanted = resident_budget(*arguments, workload, self.costs) if self.budget is None else self.budget
        smallest = smallest_budget(*arguments, workload, self.costs)
        return plan(*arguments, max(smallest, wanted), workload, self.costs)

    def smallest_budget(self, workload: Workload, stream_kv: bool = True) -> int:
        """Bytes of the smallest budget that `plan` accepts; without `stream_kv`, with all keys and values in memory."""
        workload = replace(workload, kv=self.kv)
        layouts = [self.pack.layout, *([self.pack.manifest.packed] if self.pack.sources else [])]
        return min(smallest_budget(self.spec, layout, workload, self.costs, stream_kv=stream_kv) for layout in layouts)

    def load(
        self,
        workload: Workload,
        progress: Stages = lambda stage, done, total: None,
        planned: Callable[[Plan], None] = lambda the_plan: None,
        behind: bool = False,
    ) -> Engine:
        """Plan for `workload` and load, behind the model that drafts; `planned` is shown the plan in between.

        A GGUF file that is read itself is packed into the cache before where that pays soon; see `Packing`.

        behind: return while weights are still read, which the first pass then waits for; on the CPU

        Raises BudgetError, before anything else is loaded, when the budget is too small.
        """
        drafting = self._load_draft(workload.context)
        try:
            packing = self.packing(workload)
            if packing is not None and packing.first:
                self._pack_source(progress, packing)
            the_plan = self.plan(workload)
            planned(the_plan)
            return self.engine(the_plan, lambda done, total: progress("loading", done, total), drafting, behind)
        except BaseException:
            if drafting is not None:
                drafting.close()
            raise

    def engine(
        self,
        the_plan: Plan,
        progress: Progress = lambda done, total: None,
        drafting: Engine | None = None,
        behind: bool = False,
    ) -> Engine:
        """Allocate what the plan says, load what it pins (see `load`); the engine closes the one that drafts."""
        # Measured now: beside a loaded model that takes memory that is not planned, and reads that disturb.
        disk = None if the_plan.resident else self.disk()
        roof = None if disk is None else DiskRoof(self.cache, self.disk_number, disk)
        engine = build_engine(
            self.pack,
            the_plan,
            self.tokenizer,
            self.runtime,
            progress=progress,
            roof=roof,
            drafting=drafting,
            kv_dir=self.options.kv_folder,
            behind=behind,
        )
        if AHEAD in the_plan.owners and self.ahead is not None:
            with closing_on_error(engine):
                own = ahead_plan(self.ahead, self.runtime, the_plan.context, self.costs.kv_codec)
                load_ahead(self.ahead, own, engine)
        if self.options.session_dir is not None:
            with closing_on_error(engine):
                engine.keep_sessions(Path(self.options.session_dir), self.options.session_bytes)
        return engine

    def _pack_source(self, progress: Stages, packing: Packing) -> None:
        """Take the pack of its file in place of this outline."""
        outline, file = self.pack, self.pack.sources[0].path
        warnings.warn(
            f"{file} is packed into the cache, once, which takes {packing.nbytes / 1e9:.2f} GB there: {packing.why}",
            CheckpointWarning,
            stacklevel=3,
        )
        packed = Pack(resolve(file, self.cache, progress=progress), self.options.scaling, self.options.experts_used)
        if packed.layout != outline.manifest.packed:
            raise PackError(f"{packed.path} holds another model than {file} now: remove it, and run this again")
        self.pack = self.exact = packed
        self.__dict__.pop("ahead", None)
        vars(self).pop("costs", None)  # which say what kernels take for the layout

    def _load_draft(self, context: int) -> Engine | None:
        if self.draft is None:
            return None
        check_draft(self.draft, self.pack, context)
        return load_draft(self.draft, self.tokenizer, self.runtime, self.budget, context)

    def _with_drafts(self, workload: Workload) -> Workload:
        """`workload` with drafts as they are asked for; by default where they may pay, and there is room.

        Keys and values leave memory for no draft. On a GPU a pass of several tokens rounds otherwise than one of one,
        so it only drafts when it is told to.
        """
        most = self.options.max_draft_tokens
        if workload.sequences > 1:  # whose rows are better spent on sequences
            return workload
        if most is not None:
            return replace(workload, max_draft_tokens=most)
        drafting = replace(workload, max_draft_tokens=AUTO_DRAFT_TOKENS)
        return drafting if self.runtime.bounds_process and self._has_room(drafting, workload) else workload

    def _with_ahead(self, workload: Workload) -> Workload | None:
        """`workload` with the layer that predicts further tokens; None where there is none, or no room for it."""
        exact = self.pack is self.exact and self.draft is None and self.runtime.bounds_process
        if workload.max_draft_tokens == 1 or not exact or self.ahead is None:
            return None
        own = ahead_plan(self.ahead, self.runtime, workload.context, self.costs.kv_codec)
        beside = replace(workload, ahead_bytes=ahead_bytes(own, self.spec.hidden))
        return beside if self._has_room(beside, workload) else None

    def _has_room(self, drafting: Workload, without: Workload) -> bool:
        """Whether the budget holds drafts too, and keys and values in memory where it holds these without drafts."""
        if self.budget is None:
            return True
        resident = self.smallest_budget(without, stream_kv=False) - PEAK_JITTER <= self.budget
        return self.smallest_budget(drafting, stream_kv=not resident) <= self.budget

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

    @property
    def disk_number(self) -> int:
        """The device number under which the disk is known that weights lie on."""
        return self.pack.largest_file.stat().st_dev

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


@contextlib.contextmanager
def closing_on_error(engine: Engine) -> Iterator[None]:
    """Closes `engine` where the block fails."""
    try:
        yield
    except BaseException:
        engine.close()
        raise
