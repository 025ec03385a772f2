"""From what a user names (a pack, a checkpoint, a hub repository, a demo model) to an engine."""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flashrt.budget.plan import Workload
from flashrt.checkpoints.resolve import Progress, resolve
from flashrt.config import GIB
from flashrt.engine.loaded_pack import LoadedPack, closing_on_error
from flashrt.engine.options import LoadOptions, checked_path
from flashrt.engine.runtime import runtime_for
from flashrt.errors import BudgetWarning, PackError, UsageError
from flashrt.machine.process import installed_bytes, memory_limit
from flashrt.rope import RopeScaling
from flashrt.storage.manifest import SPARSE_DIR
from flashrt.storage.pack import Pack, is_pack

if TYPE_CHECKING:
    from flashrt.engine.engine import Engine


def load(where: str | Path, options: LoadOptions) -> Engine:
    """See `flashrt.load`."""
    model = open_model(where, options)
    engine = model.load(Workload(model.context))
    if options.session is not None:
        with closing_on_error(engine):
            engine.resume(options.session)
    return engine


def open_model(
    where: str | Path,
    options: LoadOptions,
    progress: Progress = lambda *_: None,
    modules: Sequence[str] = (),
) -> LoadedPack:
    """Open the pack that `where` names; a checkpoint is packed first, once, or a GGUF file outlined.

    `modules` are those that the caller imports later: they are counted as part of the process. Raises a FlashrtError
    where the model, its calibration or its draft is not there or does not fit, as far as can be told before planning.
    """
    path = checked_path("the model", where)
    runtime = runtime_for(options.device, options.threads, options.host_budget_gb)
    if runtime.bounds_process and options.budget is not None:
        warn_of_limits(options.budget)
    draft = None if options.draft is None else Pack(options.draft)
    scaling = options.scaling
    unscaled = options.context if scaling is None else None  # a scaled context is checked once the pack is open
    outline = options.mode == options.kv == "exact" and runtime.bounds_process  # others need what a pack holds
    found = resolve(path, options.cache, options.dtype, progress, unscaled, outline)
    exact = Pack(found, scaling, options.experts_used)
    if exact.manifest.sparsity is not None:
        raise UsageError(
            f"{exact.path} is a calibrated pack, which leaves out: name {exact.path.parent} and --mode sparse"
        )
    pack = sparse_pack(exact, options.max_loss, scaling) if options.mode == "sparse" else exact
    warm_up(modules)
    return LoadedPack(pack, options, runtime, exact=exact, draft=draft)


def warn_of_limits(budget: int) -> None:
    """A BudgetWarning where a cgroup, or the machine, has less than the budget: the kernel ends who takes more."""
    limit, installed = memory_limit(), installed_bytes()
    what, most = ("this process's cgroup allows", limit) if limit is not None else ("the machine has", installed)
    if most is not None and most < budget:
        warnings.warn(
            f"a budget of {budget / GIB:.2f} GiB, and {what} {most / GIB:.2f} GiB: the kernel may end the run. "
            "Lower --budget-gb below that, or raise the limit",
            BudgetWarning,
            stacklevel=2,
        )


def warm_up(modules: Sequence[str]) -> None:
    """Import what is used after the process was measured, so that the measure counts it, and skip what is absent."""
    for name in modules:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def sparse_pack(exact: Pack, max_loss: float | None = None, scaling: RopeScaling | None = None) -> Pack:
    """The calibrated pack inside the pack `exact`.

    Raises UsageError when it is not calibrated, or for a larger loss than `max_loss`; PackError when what is there was
    calibrated for other weights or by another version.
    """
    base = exact.path
    if any(layer.ffn.experts for layer in exact.spec.layers):
        raise UsageError("a mixture of experts reads what its router names in exact mode already: use --mode exact")
    if not is_pack(base / SPARSE_DIR):
        raise UsageError(f"{base} is not calibrated: run `flashrt calibrate {base}` first, or use --mode exact")
    sparse = Pack(base / SPARSE_DIR, scaling)
    sparsity = sparse.manifest.sparsity
    if sparsity is None or sparsity.base != exact.manifest.hash:
        raise PackError(
            f"{sparse.path} was calibrated for another pack than {base}: run `flashrt calibrate {base}` again"
        )
    if max_loss is not None and sparsity.max_loss > max_loss:
        raise UsageError(
            f"{base} was calibrated for a loss of {sparsity.max_loss:.2%}, at most {max_loss:.2%} is allowed: "
            f"run `flashrt calibrate {base} --max-loss {max_loss:g}`"
        )
    return sparse
