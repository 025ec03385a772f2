"""What sparse attention keeps: the share that was asked for, or the smallest whose loss is allowed."""

from __future__ import annotations

from dataclasses import replace

from flashrt.engine.options import LoadOptions
from flashrt.errors import UsageError
from flashrt.kv.choice import SparseKv
from flashrt.labels import KvLabels, share_of
from flashrt.sparsity import Sparsity
from flashrt.storage.kv_labels import read_labels
from flashrt.storage.pack import Pack

DEFAULT_KEEP = 1 / 16  # of all positions, where neither a share nor a loss is given


def sparse_kv(exact: Pack, options: LoadOptions, sparsity: Sparsity | None) -> SparseKv | None:
    """How decode passes of `exact` choose what they attend to; None where they attend to everything.

    The loss allowed is that of everything left out together: what `sparsity` of the feed-forward blocks may cost is
    taken from it. Raises UsageError where labels were never calibrated, or lose more than is allowed; PackError where
    they are damaged or another pack's.
    """
    if options.kv == "exact":
        return None
    if exact.spec.latent:
        raise UsageError(f"--kv sparse: latents of this {exact.spec.family} model cannot have labels; use --kv exact")
    labels = read_labels(exact)
    if options.scaling is not None:
        labels = replace(labels, losses={})  # they were measured with the model's own rotation
    if options.max_loss is None:
        return SparseKv.of(labels, options.keep or DEFAULT_KEEP)
    if not labels.losses and options.keep != 1:
        raise UsageError(
            "--max-loss cannot be promised with --kv sparse: its loss was not measured for this pack and rotation. "
            "Leave --max-loss out, or use --kv exact"
        )
    allowed = options.max_loss - (0.0 if sparsity is None else sparsity.max_loss)
    keep = options.keep or _smallest(labels, allowed)
    loss = None if keep is None else labels.loss(keep)
    if keep is None or loss is None or loss > allowed:
        shares = sorted(labels.losses, key=share_of, reverse=True)
        known = ", ".join(f"{share} {labels.losses[share]:+.2%}" for share in shares)
        raise UsageError(
            f"--max-loss {options.max_loss:g} leaves {allowed:.2%} for sparse attention; measured were: {known}. "
            "Allow more, keep more with --kv-keep, or use --kv exact"
        )
    return SparseKv.of(labels, keep)


def _smallest(labels: KvLabels, allowed: float) -> float | None:
    """The smallest share measured whose loss is allowed, and that of every larger one too."""
    found = None
    for share in sorted(map(share_of, labels.losses), reverse=True):
        loss = labels.loss(share)
        if loss is None or loss > allowed:
            break
        found = share
    return found
