"""A small checkpoint that drafts for a large one, inside the same budget."""

from __future__ import annotations

from pathlib import Path

from flashrt.budget.planner import GIB, Workload, plan, resident_budget
from flashrt.engine.build import LoadedPack, build_engine
from flashrt.engine.engine import Engine
from flashrt.errors import BudgetError, UsageError
from flashrt.storage.pack import Pack
from flashrt.text.files import TOKENIZER


def load_draft(path: Path, prepared: LoadedPack, context: int) -> Engine:
    """An engine of the pack at `path`, all of it in memory; what is `prepared` is planned beside it afterwards.

    Raises UsageError where it has other tokens or less context, BudgetError when it does not fit.
    """
    draft, runtime = Pack(path), prepared.runtime
    if draft.manifest.text_files[TOKENIZER] != prepared.pack.manifest.text_files[TOKENIZER]:
        raise UsageError(f"{path} cannot draft for {prepared.pack.path}: its tokenizer is another one")
    if draft.spec.vocab > prepared.spec.vocab or draft.spec.context < context:
        raise UsageError(
            f"{path} cannot draft for {prepared.pack.path}: it has {draft.spec.vocab} tokens and a context of "
            f"{draft.spec.context}, expected at most {prepared.spec.vocab} and at least {context}"
        )
    workload, costs = Workload(context), runtime.fixed_costs(draft)
    needed = resident_budget(draft.spec, draft.layout, workload, costs)
    if prepared.budget is not None and prepared.budget < needed:
        raise BudgetError(
            f"a budget of {prepared.budget / GIB:.3f} GiB does not hold the draft model, which takes "
            f"{needed / GIB:.3f} GiB and must be resident: use a larger --budget-gb, or no --draft"
        )
    the_plan = plan(draft.spec, draft.layout, needed, workload, costs)
    return build_engine(draft, the_plan, prepared.tokenizer, runtime)
