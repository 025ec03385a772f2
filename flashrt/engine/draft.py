"""A small checkpoint that drafts for a large one, inside the same budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flashrt.budget.planner import GIB, Workload, plan, resident_budget
from flashrt.engine.build import build_engine
from flashrt.errors import BudgetError, UsageError
from flashrt.storage.pack import Pack
from flashrt.text.files import TOKENIZER

if TYPE_CHECKING:
    from flashrt.engine.engine import Engine
    from flashrt.engine.loaded_pack import LoadedPack


def load_draft(draft: Pack, model: LoadedPack, context: int) -> Engine:
    """An engine of the pack `draft`, all of it in memory; `model` is planned beside it afterwards.

    Raises UsageError where it has other tokens or less context, BudgetError when it does not fit.
    """
    if draft.manifest.text_files[TOKENIZER] != model.pack.manifest.text_files[TOKENIZER]:
        raise UsageError(f"{draft.path} cannot draft for {model.pack.path}: its tokenizer is another one")
    if draft.spec.vocab > model.spec.vocab or draft.spec.context < context:
        raise UsageError(
            f"{draft.path} cannot draft for {model.pack.path}: it has {draft.spec.vocab} tokens and a context of "
            f"{draft.spec.context}, expected at most {model.spec.vocab} and at least {context}"
        )
    workload, costs = Workload(context), model.runtime.fixed_costs(draft)
    needed = resident_budget(draft.spec, draft.layout, workload, costs)
    if model.budget is not None and model.budget < needed:
        raise BudgetError(
            f"a budget of {model.budget / GIB:.3f} GiB does not hold the draft model, which takes "
            f"{needed / GIB:.3f} GiB and must be resident: use a larger --budget-gb, or no --draft"
        )
    the_plan = plan(draft.spec, draft.layout, needed, workload, costs)
    return build_engine(draft, the_plan, model.tokenizer, model.runtime)
