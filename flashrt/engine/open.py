"""From what a user names (a pack, a checkpoint, a hub repository, a demo model) to an engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from flashrt.checkpoints.resolve import resolve
from flashrt.errors import PackError, UsageError
from flashrt.storage.names import default_cache

if TYPE_CHECKING:
    from flashrt.engine.engine import Engine


def load(
    path: str | Path,
    budget_gb: float | None = None,
    *,
    context: int | None = None,
    dtype: str = "int8",
    cache_dir: str | Path | None = None,
    threads: int | None = None,
    device: str = "cpu",
    host_budget_gb: float | None = None,
    mode: str = "exact",
    max_loss: float | None = None,
    speculate: str | int = "auto",
    draft: str | Path | None = None,
) -> Engine:
    """See `flashrt.load`."""
    from flashrt.budget.planner import Workload
    from flashrt.config import budget_bytes, checked_context, parse_speculate
    from flashrt.engine.build import DEFAULT_CONTEXT, LoadedPack
    from flashrt.engine.draft import load_draft
    from flashrt.engine.runtime import runtime_for

    # What is asked is checked before a checkpoint is packed, which may take an hour.
    if budget_gb is not None:
        budget_bytes(budget_gb)
    check_mode(mode, max_loss)
    most = parse_speculate(speculate)
    runtime = runtime_for(device, threads, host_budget_gb)
    cache = Path(cache_dir) if cache_dir else default_cache()
    found = resolve(path, cache, dtype, context=context)
    prepared = LoadedPack(pack_for(found, mode, max_loss), cache, runtime, budget_gb)
    length = checked_context(prepared.spec, context, DEFAULT_CONTEXT)
    drafting = None if draft is None else load_draft(draft_pack(draft, most, device), prepared, length)
    engine = prepared.engine(prepared.plan(prepared.drafting(Workload(length), most)))
    engine.drafting = drafting
    return engine


def check_mode(mode: str, max_loss: float | None) -> None:
    """Raises UsageError for a mode that there is not, or a loss that makes no sense with it."""
    if mode not in ("exact", "sparse"):
        raise UsageError(f"unknown mode {mode!r}: expected exact or sparse")
    if max_loss is not None and mode == "exact":
        raise UsageError("--max-loss needs --mode sparse: exact mode loses nothing")
    if max_loss is not None and not 0 < max_loss <= 1:
        raise UsageError(f"the loss allowed is {max_loss}, expected more than 0 and at most 1 (0.02 is 2%)")


def pack_for(found: Path, mode: str, max_loss: float | None) -> Path:
    """The pack that a mode runs, for the pack that a user names. Raises UsageError or PackError; see `sparse_pack`."""
    from flashrt.storage.pack import Pack

    if mode == "sparse":
        return sparse_pack(found, max_loss)
    if Pack(found).manifest.sparsity is not None:
        raise UsageError(f"{found} is a calibrated pack, which leaves out: name {found.parent} and --mode sparse")
    return found


def draft_pack(path: str | Path, max_draft_tokens: int | None, device: str) -> Path:
    """The pack that is to draft. Raises UsageError for what is no pack, and where nothing is drafted."""
    from flashrt.storage.pack import Pack

    if max_draft_tokens == 1:
        raise UsageError("--draft needs drafts: leave --speculate off out")
    if device != "cpu":
        raise UsageError("--draft computes on the CPU only: use --device cpu")
    Pack(path)
    return Path(path)


def sparse_pack(base: Path, max_loss: float | None = None) -> Path:
    """The calibrated pack inside the pack `base`.

    Raises UsageError when it is not calibrated, or for a larger loss than `max_loss`; PackError when what is there was
    calibrated for other weights or by another version.
    """
    from flashrt.storage.manifest import SPARSE_DIR
    from flashrt.storage.pack import Pack, is_pack

    path, exact = base / SPARSE_DIR, Pack(base)
    if any(layer.ffn.experts for layer in exact.spec.layers):
        raise UsageError("a mixture of experts reads what its router names in exact mode already: use --mode exact")
    if not is_pack(path):
        raise UsageError(f"{base} is not calibrated: run `flashrt calibrate {base}` first, or use --mode exact")
    sparsity = Pack(path).manifest.sparsity
    if sparsity is None or sparsity.base != exact.manifest.hash:
        raise PackError(f"{path} was calibrated for another pack than {base}: run `flashrt calibrate {base}` again")
    if max_loss is not None and sparsity.max_loss > max_loss:
        raise UsageError(
            f"{base} was calibrated for a loss of {sparsity.max_loss:.2%}, at most {max_loss:.2%} is allowed: "
            f"run `flashrt calibrate {base} --max-loss {max_loss:g}`"
        )
    return path
