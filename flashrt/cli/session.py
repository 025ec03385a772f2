"""What the commands that run a model share: from options to an opened pack."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flashrt.cli.console import Progress, say, size
from flashrt.cli.options import DeviceName, ModeName
from flashrt.config import budget_bytes, parse_speculate
from flashrt.engine.open import check_mode, draft_pack, pack_for, resolve
from flashrt.storage.names import default_cache
from flashrt_kernels.rows import Codec

if TYPE_CHECKING:
    from flashrt.budget.planner import Plan, Workload
    from flashrt.engine.build import LoadedPack
    from flashrt.engine.engine import Engine
    from flashrt.spec import ModelSpec
    from flashrt.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Settings:
    """The options that say which model runs where."""

    where: str
    budget_gb: float | None
    dtype: Codec
    threads: int | None
    device: DeviceName
    host_budget_gb: float | None
    cache_dir: Path | None
    context: int | None = None  # tokens that the model must support
    mode: ModeName = ModeName.EXACT
    max_loss: float | None = None
    speculate: str = "off"
    draft: str | None = None

    @property
    def cache(self) -> Path:
        return self.cache_dir or default_cache()

    def check(self) -> None:
        """Refuse a budget that is no budget and a mode that is none, before anything is opened. Raises UsageError."""
        for budget in (self.budget_gb, self.host_budget_gb):
            if budget is not None:
                budget_bytes(budget)
        check_mode(self.mode.value, self.max_loss)
        most = parse_speculate(self.speculate)
        if self.draft is not None:
            draft_pack(self.draft, most, self.device.value)


class Session:
    """An opened pack, and from it a plan and an engine. Use it as a context manager."""

    def __init__(self, settings: Settings) -> None:
        from flashrt.engine.build import LoadedPack
        from flashrt.engine.runtime import runtime_for

        # What is asked is checked before a checkpoint is packed, which may take an hour.
        settings.check()
        self.settings = settings
        runtime = runtime_for(settings.device.value, settings.threads, settings.host_budget_gb)
        with Progress() as progress:
            path = resolve(settings.where, settings.cache, settings.dtype.value, progress, settings.context)
        self.exact = path
        path = pack_for(path, settings.mode.value, settings.max_loss)
        # A bar that is drawn while loading must be there when the process is measured.
        self._loading = Progress()
        self.prepared: LoadedPack = LoadedPack(path, settings.cache, runtime, settings.budget_gb)

    @property
    def spec(self) -> ModelSpec:
        return self.prepared.spec

    @property
    def tokenizer(self) -> Tokenizer:
        return self.prepared.tokenizer

    def plan(self, workload: Workload) -> Plan:
        """Plan for `workload`, drafts included."""
        return self.prepared.plan(self.prepared.drafting(workload, parse_speculate(self.settings.speculate)))

    def engine(self, workload: Workload) -> Engine:
        """Plan for `workload`, then load. Raises BudgetError before anything is loaded."""
        drafting = None
        if self.settings.draft is not None:
            from flashrt.engine.draft import load_draft

            drafting = load_draft(Path(self.settings.draft), self.prepared, workload.context)
        the_plan = self.plan(workload)
        if warning := self.slower(workload, the_plan):
            say(warning)
        with self._loading as progress:
            engine = self.prepared.engine(the_plan, progress.of("loading"))
        engine.drafting = drafting
        return engine

    def slower(self, workload: Workload, the_plan: Plan) -> str | None:
        """Why sparse mode does not pay under this plan, as one line; None where it does, and in exact mode."""
        if self.settings.mode is ModeName.EXACT:
            return None
        exact_plan = self.prepared.exact_plan(self.exact, workload)
        exact, sparse = exact_plan.streamed_bytes_per_token, the_plan.streamed_bytes_per_token
        exact_s, sparse_s = map(self.prepared.read_seconds, (exact_plan, the_plan))
        longer = exact_s is not None and sparse_s is not None and sparse_s > exact_s
        if sparse <= exact and (sparse < exact or the_plan.resident) and not longer:
            return None
        rows = the_plan.scattered_reads_per_token
        scattered = f" in {rows:.0f} scattered rows" if rows >= 1 else ""
        return (
            f"note: at this budget sparse mode reads {size(sparse)} per token{scattered}, exact mode {size(exact)}: "
            "--mode exact is as fast, and loses nothing"
        )
