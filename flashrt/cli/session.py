"""What the commands that run a model share: from options to an open pack, and to an engine."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flashrt.cli.console import BAR_MODULES, Progress, say, size
from flashrt.engine import open as loader
from flashrt.engine.options import LoadOptions
from flashrt.errors import UsageError
from flashrt.spec import full_ropes
from flashrt.storage.names import exists

if TYPE_CHECKING:
    from flashrt.budget.plan import Plan, Workload
    from flashrt.engine.engine import Engine
    from flashrt.engine.loaded_pack import LoadedPack
    from flashrt.storage.session_file import Messages


def open_model(where: str, options: LoadOptions, modules: Sequence[str] = ()) -> LoadedPack:
    """See `flashrt.engine.open.open_model`; shows how far packing has come, and counts the bar that loading draws."""
    bars = BAR_MODULES if sys.stderr.isatty() else ()
    with Progress() as progress:
        model = loader.open_model(where, options, progress, (*bars, *modules))
    for note in (replaced(model), fewer(model)):
        if note is not None:
            say(note)
    return model


def replaced(model: LoadedPack) -> str | None:
    """What --rope-scaling takes the place of, as one line; None where the model has no scaling of its own."""
    stored = model.exact.manifest.spec
    kinds = sorted({rope.kind for rope in full_ropes(stored.layers)} - {"default"})
    if model.options.scaling is None or not kinds:
        return None
    return (
        f"note: --rope-scaling {model.options.scaling} replaces the model's own scaling ({', '.join(kinds)}, up to "
        f"{stored.context} tokens): contexts up to {model.spec.context}"
    )


def fewer(model: LoadedPack) -> str | None:
    """What --experts-used takes the place of, as one line; None where routers name as many as the model says."""
    if model.exact.fewer_experts is None:
        return None
    trained = model.exact.manifest.spec.experts_per_token
    return (
        f"note: {model.exact.fewer_experts} experts a token, of the {trained} that the model was trained with: "
        "its results change, and `flashrt eval ppl` says by how much"
    )


def load(model: LoadedPack, workload: Workload, progress: Progress | None = None) -> Engine:
    """Plan for `workload`, then load; says so where sparse mode does not pay. Raises BudgetError.

    Given `progress`, to be stopped when the first token is there, it returns while weights are still read.
    """

    def note(the_plan: Plan) -> None:
        if warning := slower(model, workload, the_plan):
            say(warning)
        if model.pack.sources:
            packing = model.packing(workload)
            gain = "which has checksums" if packing is None else packing.why
            say(
                f"note: weights are read from {model.pack.sources[0].path} itself, nothing is packed; "
                f"`flashrt pack` makes a pack: {gain}"
            )

    if progress is not None:
        return model.load(workload, progress, note, behind=True)
    with Progress() as shown:
        return model.load(workload, shown, note)


def resume(engine: Engine, path: str | Path | None, *, chat: bool, prompt: list[int] | None = None) -> Messages | None:
    """Go on from the session at `path`, if one is there; see `Engine.resume`. Returns its messages.

    Raises UsageError for the session of a conversation where a text is asked for, and the other way round: saving would
    lose it.
    """
    if path is None or not exists(Path(path)):
        return None
    messages = engine.resume(path, prompt)
    if (messages is not None) != chat:
        held, command = ("a conversation", "flashrt chat") if messages is not None else ("a text", "flashrt run")
        raise UsageError(f"{path} is the session of {held}: go on with `{command}`, or name another file")
    return messages


def save(engine: Engine, path: str | Path | None, messages: Messages | None = None) -> None:
    """Save to `path`, if one is given, what was computed so far."""
    if path is not None and engine.sequence.length:
        engine.save(path, messages)


def slower(model: LoadedPack, workload: Workload, the_plan: Plan) -> str | None:
    """Why sparse mode does not pay under this plan, as one line; None where it does, and in exact mode."""
    if model.options.mode == "exact":
        return None
    exact_plan = model.exact_plan(workload)
    exact, sparse = exact_plan.streamed_bytes_per_token, the_plan.streamed_bytes_per_token
    exact_s, sparse_s = map(model.read_seconds, (exact_plan, the_plan))
    longer = exact_s is not None and sparse_s is not None and sparse_s > exact_s
    if sparse <= exact and (sparse < exact or the_plan.resident) and not longer:
        return None
    rows = the_plan.scattered_reads_per_token
    scattered = f" in {rows:.0f} scattered rows" if rows >= 1 else ""
    return (
        f"note: at this budget sparse mode reads {size(sparse)} per token{scattered}, exact mode {size(exact)}: "
        "--mode exact is as fast, and loses nothing"
    )
