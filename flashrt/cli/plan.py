"""flashrt plan: where every byte of a budget goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import typer

from flashrt.cli import options
from flashrt.cli.console import BAR_MODULES, Progress, emit, rate, say, show, size, table
from flashrt.engine.options import LoadOptions

if TYPE_CHECKING:
    from flashrt.budget.plan import Plan
    from flashrt.checkpoints.outlines import Outline
    from flashrt.engine.loaded_pack import LoadedPack
    from flashrt.spec import ModelSpec
    from flashrt.storage.layout import PackLayout

BAR = 24  # characters of the longest bar
EIGHTHS = " ▏▎▍▌▋▊▉"


def register(app: typer.Typer, name: str, guarded: Callable[..., Any]) -> None:
    app.command(name)(guarded(plan))


@options.loads(*(field for field in options.LOAD if field not in ("draft", "kv_dir", *options.SESSIONS)))
def plan(
    pack: options.Model,
    sequences: options.Sequences = None,
    *,
    load: LoadOptions,
    json: options.Json = False,
) -> None:
    """Show where every byte of a budget would go, without loading the model.

    One row per owner: what it takes, its share of the budget, and for weights the part that stays resident. Then what
    a token reads from disk, the speed that the disk allows for (measured by `flashrt doctor`), and the smallest budget.
    Of a hub repository that is not packed yet, only headers are read: nothing is downloaded.
    With --sequences, for so many of the context each, and the number that `flashrt batch` would take.

    Example: flashrt plan demo --budget-gb 1 --context 4096
    Example: flashrt plan org/name --budget-gb 8
    """
    from flashrt.checkpoints.outlines import outlined
    from flashrt.cli import session

    with Progress() as progress, outlined(pack, load.cache, load.dtype, progress) as outline:
        progress.stop()
        # Bars are counted, so that `run` accepts the smallest budget even where it draws them.
        model = session.open_model(pack if outline is None else str(outline.path), load, BAR_MODULES)
        _show(model, sequences, json, outline)


def _show(model: LoadedPack, sequences: int | None, json: bool, outline: Outline | None) -> None:
    from flashrt.budget.plan import Workload
    from flashrt.cli import session
    from flashrt.machine.disk import load_disk_profile

    workload = Workload(model.context, sequences=sequences or 1)
    packing = model.packing(workload)
    the_plan = packing.plan if packing is not None and packing.first else model.plan(workload)
    disk = load_disk_profile(model.cache, model.disk_number)
    speed = disk.sequential if disk is not None else None
    streamed = the_plan.streamed_bytes_per_token - the_plan.kv_cell_bytes_per_token  # of cells, many are cached
    extra = {
        "smallest_budget_bytes": model.smallest_budget(workload),
        "resident_share": the_plan.pinned_bytes / the_plan.weight_bytes,
        "disk_bytes_per_s": speed,
        "expected_tok_per_s": speed / streamed if speed and streamed else None,
        "pack_bytes": model.pack.manifest.packed.nbytes,
        "reads_file": model.pack.sources[0].path if model.pack.sources else None,
        "packs_first": packing is not None and packing.first,
        "pack_seconds": None if packing is None else packing.seconds,
        "pack_gain": None if packing is None else packing.why,
        "download_bytes": None if outline is None else outline.download_bytes,
        "together": None if sequences is None else _together(model),
    }
    warning = session.slower(model, workload, the_plan)
    if json:
        emit(the_plan.to_json() | extra | {"mode": model.options.mode, "pays": warning is None})
    else:
        packed = model.pack.manifest.packed if extra["packs_first"] else model.pack.layout
        show(_table(the_plan, _resident(model.spec, packed, the_plan)))
        print("\n".join(_lines(the_plan, extra)))
        if warning:
            say(warning)


def _together(model: LoadedPack) -> list[dict[str, Any]]:
    """What is estimated of each number of sequences, half of whose context are prompts; the best first."""
    from flashrt.budget.plan import Workload
    from flashrt.config import MOST_SEQUENCES
    from flashrt.engine.sequences import Demand, choose

    half = max(model.context // 2, 1)
    answers = 2 * MOST_SEQUENCES
    choice = choose(model, Workload(model.context), Demand(answers, answers * half, answers * half, half))
    others = [each for each in choice.tried if each is not choice.best]
    return [each.to_json() for each in (choice.best, *others)]


def _resident(spec: ModelSpec, layout: PackLayout, the_plan: Plan) -> dict[str, float]:
    """Owner of weights → the share of them that stays resident."""
    from flashrt.budget.owners import owner_of, prefix_bytes

    total: dict[str, int] = {}
    pinned: dict[str, int] = {}
    for tensor in layout.tensors.values():
        owner = owner_of(spec, tensor)
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


def _kv(the_plan: Plan) -> str:
    """Where keys and values lie."""
    kv = f"{the_plan.kv_codec.value}, {size(the_plan.owners['KV'])} in memory"
    if the_plan.far is None:
        return kv
    kv += f", {size(the_plan.kv_disk_bytes)} on disk"
    if streamed := the_plan.far.streamed_bytes:
        kv += f", of which a token at the end of the context reads {size(streamed)}"
    if the_plan.kv_cells:
        cached = size(the_plan.kv_cells * the_plan.far.cell_bytes)
        kv += f"; a token chooses {size(the_plan.kv_cell_bytes_per_token)} there, a cache holds {cached}"
    return kv


def _read(the_plan: Plan) -> str:
    """What a token reads from disk."""
    chosen = the_plan.kv_cell_bytes_per_token
    read = size(the_plan.streamed_bytes_per_token - chosen)
    return f"{read}, and what the cache lacks of {size(chosen)} that it chooses" if chosen else read


def _pack(extra: dict[str, Any]) -> str:
    """What of a pack there is, or would be."""
    nbytes, file = size(extra["pack_bytes"]), extra["reads_file"]
    if file is None:
        return f"{nbytes} on disk"
    if extra["packs_first"]:
        return f"{nbytes} on disk, made by the first run in about {extra['pack_seconds']:.0f} s: {extra['pack_gain']}"
    if extra["pack_gain"] is None:
        return f"none, weights are read from {file}"
    time = f"about {extra['pack_seconds']:.0f} s"
    return f"none, weights stream from {file}; one of {nbytes} takes {time} to make: {extra['pack_gain']}"


def _lines(the_plan: Plan, extra: dict[str, Any]) -> list[str]:
    from flashrt.budget.planner import ceil_gib
    from flashrt.storage.layout import PAGE

    weights = f"{size(the_plan.pinned_bytes)} of {size(the_plan.weight_bytes)}"
    download = extra["download_bytes"]
    lines = [
        *([] if download is None else [f"download          {size(download)}, of which only headers were read"]),
        f"pack              {_pack(extra)}",
        f"context           {the_plan.context} tokens, prefill in passes of {the_plan.prefill_chunk}",
        f"keys and values   {_kv(the_plan)}",
        f"resident weights  {weights} ({extra['resident_share']:.1%})",
        *(f"{label:<18}{text}" for tier in the_plan.all_tiers for label, text in tier.lines(size).items()),
        *([] if the_plan.kv is None else [f"attention         {the_plan.kv.describe()}"]),
        f"read per token    {_read(the_plan)}",
    ]
    if the_plan.streamed_bytes_per_token - the_plan.kv_cell_bytes_per_token > PAGE:  # more than a row of embeddings
        if extra["expected_tok_per_s"]:
            at = f"{extra['expected_tok_per_s']:.2f} tokens/s, the disk giving {rate(extra['disk_bytes_per_s'])}"
        else:
            at = "unknown until `flashrt doctor`, or a first run, has measured the disk"
        lines.append(f"at most           {at}")
    if the_plan.max_draft_tokens > 1:
        source = "the text and the resident neurons" if the_plan.drafts else "the text"
        lines.append(f"drafts            by {source}, up to {the_plan.max_draft_tokens} tokens verified in a pass")
    if extra["together"]:
        best = extra["together"][0]
        lines.append(
            f"together          {best['sequences']} sequences give the most, about {best['tok_per_s']:.1f} tokens/s, "
            f"prompts half of the context; {the_plan.sequences} asked for"
        )
    lines.append(f"smallest budget   --budget-gb {ceil_gib(extra['smallest_budget_bytes']):.3f}")
    return lines
