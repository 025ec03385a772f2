"""A small checkpoint that drafts for a large one, inside the same budget."""

from __future__ import annotations

from flashrt.budget.plan import Workload
from flashrt.budget.planner import GIB, plan, resident_budget
from flashrt.engine.build import build_engine
from flashrt.engine.engine import Engine
from flashrt.engine.runtime import Runtime
from flashrt.errors import BudgetError, UsageError
from flashrt.storage.pack import Pack
from flashrt.text.files import TOKENIZER
from flashrt.text.tokenizer import Tokenizer


def check_draft(draft: Pack, pack: Pack, context: int) -> None:
    """Raises UsageError where `draft` has other tokens than `pack`, or less context."""
    if draft.manifest.text_files[TOKENIZER] != pack.manifest.text_files[TOKENIZER]:
        raise UsageError(f"{draft.path} cannot draft for {pack.path}: its tokenizer is another one")
    if draft.spec.vocab > pack.spec.vocab or draft.spec.context < context:
        raise UsageError(
            f"{draft.path} cannot draft for {pack.path}: it has {draft.spec.vocab} tokens and a context of "
            f"{draft.spec.context}, expected at most {pack.spec.vocab} and at least {context}"
        )


def load_draft(draft: Pack, tokenizer: Tokenizer, runtime: Runtime, budget: int | None, context: int) -> Engine:
    """An engine of the pack `draft`, all of it in memory; the model that it drafts for is planned beside it afterwards.

    Raises BudgetError when it does not fit in `budget` bytes.
    """
    workload, costs = Workload(context), runtime.fixed_costs(draft)
    needed = resident_budget(draft.spec, draft.layout, workload, costs)
    if budget is not None and budget < needed:
        raise BudgetError(
            f"a budget of {budget / GIB:.3f} GiB does not hold the draft model, which takes {needed / GIB:.3f} GiB "
            "and must be resident: use a larger --budget-gb, or no --draft"
        )
    the_plan = plan(draft.spec, draft.layout, needed, workload, costs)
    return build_engine(draft, the_plan, tokenizer, runtime)
