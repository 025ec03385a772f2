"""flashrt plan: where every byte of a budget goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashrt.cli import options
from flashrt.cli.console import emit, rate, say, show, size, table
from flashrt_kernels.rows import Codec

if TYPE_CHECKING:
    from flashrt.budget.plan import Plan
    from flashrt.cli.session import Session

BAR = 24  # characters of the longest bar
EIGHTHS = " ▏▎▍▌▋▊▉"


def register(app: typer.Typer, name: str, guarded: Callable[..., Any]) -> None:
    app.command(name)(guarded(plan))


def plan(
    pack: options.Model,
    budget_gb: options.BudgetGb = None,
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            min=1,
            metavar="N",
            show_default=False,
            help="Tokens of prompt and answer together, up to what the model supports. Omitted: 4096, or the model's.",
        ),
    ] = None,
    dtype: options.Dtype = Codec.INT8,
    mode: options.Mode = options.ModeName.EXACT,
    max_loss: options.MaxLoss = None,
    speculate: options.Speculate = "auto",
    threads: options.Threads = None,
    device: options.Device = options.DeviceName.CPU,
    host_budget_gb: options.HostBudgetGb = None,
    cache_dir: options.CacheDir = None,
    json: options.Json = False,
) -> None:
    """Show where every byte of a budget would go, without loading the model.

    One row per owner: what it takes, its share of the budget, and for weights the part that stays resident. Then what
    a token reads from disk, the speed that the disk allows for (measured by `flashrt doctor`), and the smallest budget.

    Example: flashrt plan demo --budget-gb 1 --context 4096
    """
    import rich.progress
    import rich.table  # noqa: F401 - counted, so that `run` accepts the smallest budget even where it draws bars

    from flashrt.budget.planner import Workload
    from flashrt.budget.profile import load_disk_profile
    from flashrt.cli.session import Session, Settings
    from flashrt.engine.build import DEFAULT_CONTEXT
    from flashrt.engine.open import checked_context

    session = Session(
        Settings(pack, budget_gb, dtype, threads, device, host_budget_gb, cache_dir, context, mode, max_loss, speculate)
    )
    workload = Workload(checked_context(session.spec, context, DEFAULT_CONTEXT))
    the_plan = session.plan(workload)
    disk = load_disk_profile(session.settings.cache, session.prepared.pack.path.stat().st_dev)
    speed = disk.sequential if disk is not None else None
    streamed = the_plan.streamed_bytes_per_token
    extra = {
        "smallest_budget_bytes": session.prepared.smallest_budget(workload),
        "resident_share": the_plan.pinned_bytes / the_plan.weight_bytes,
        "disk_bytes_per_s": speed,
        "expected_tok_per_s": speed / streamed if speed and streamed else None,
    }
    warning = session.slower(workload, the_plan)
    if json:
        emit(the_plan.to_json() | extra | {"mode": mode.value, "pays": warning is None})
    else:
        show(_table(the_plan, _resident(session, the_plan)))
        print("\n".join(_lines(the_plan, extra)))
        if warning:
            say(warning)


def _resident(session: Session, the_plan: Plan) -> dict[str, float]:
    """Owner of weights → the share of them that stays resident."""
    from flashrt.budget.owners import owner_of, prefix_bytes

    total: dict[str, int] = {}
    pinned: dict[str, int] = {}
    for tensor in session.prepared.pack.layout.tensors.values():
        owner = owner_of(session.spec, tensor)
        total[owner] = total.get(owner, 0) + tensor.nbytes
        pinned[owner] = pinned.get(owner, 0) + prefix_bytes(tensor, the_plan.pinned[tensor.name])
    for owner, tiers in the_plan.tiers.items():
        if owner in pinned:
            pinned[owner] += sum(tier.loaded_bytes for tier in tiers)
    return {owner: pinned[owner] / total[owner] for owner in total}


def _table(the_plan: Plan, resident: dict[str, float]) -> Any:
    result = table("owner", "takes", "of budget", "resident", "")
    result.columns[-1].justify = "left"
    owners = {**the_plan.owners, **{owner: 0 for owner in resident if owner not in the_plan.owners}}
    largest = max(owners.values())
    for owner, nbytes in owners.items():
        share = f"{resident[owner]:.0%}" if owner in resident else ""
        result.add_row(
            owner, size(nbytes), f"{nbytes / the_plan.budget_bytes:.1%}", share, _bar(nbytes / max(largest, 1))
        )
    result.add_section()
    result.add_row("budget", size(the_plan.budget_bytes), "100%", "", "")
    return result


def _bar(share: float) -> str:
    whole, part = divmod(round(share * BAR * 8), 8)
    return "█" * whole + EIGHTHS[part].strip()


def _lines(the_plan: Plan, extra: dict[str, Any]) -> list[str]:
    from flashrt.budget.planner import ceil_gib

    weights = f"{size(the_plan.pinned_bytes)} of {size(the_plan.weight_bytes)}"
    lines = [
        f"context           {the_plan.context} tokens, prefill in passes of {the_plan.prefill_chunk}",
        f"resident weights  {weights} ({extra['resident_share']:.1%})",
        *(f"{label:<18}{text}" for tier in the_plan.all_tiers for label, text in tier.lines(size).items()),
        f"read per token    {size(the_plan.streamed_bytes_per_token)}",
    ]
    if the_plan.streamed_bytes_per_token:
        if extra["expected_tok_per_s"]:
            at = f"{extra['expected_tok_per_s']:.2f} tokens/s, the disk giving {rate(extra['disk_bytes_per_s'])}"
        else:
            at = "unknown until `flashrt doctor`, or a first run, has measured the disk"
        lines.append(f"at most           {at}")
    if the_plan.max_draft_tokens > 1:
        source = "the text and the resident neurons" if the_plan.drafts else "the text"
        lines.append(f"drafts            by {source}, up to {the_plan.max_draft_tokens} tokens verified in a pass")
    lines.append(f"smallest budget   --budget-gb {ceil_gib(extra['smallest_budget_bytes']):.3f}")
    return lines
