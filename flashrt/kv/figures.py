"""Figures of what was read of keys and values, for reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from flashrt.kv.choice import SparseKv


def kv_figures(counts: Counter[str]) -> dict[str, Any]:
    """Of what `RingPages.counts` counted.

    bytes_read          keys and values read from disk
    cells               that tokens chose there
    cached              the share of these that memory held; None where there were none, as below
    read_ahead          the share that was on its way before it was wanted
    lookahead_recall    the share read ahead, of what memory did not hold
    lookahead_precision  the share of what was read ahead that was wanted
    """
    useful, ahead = counts["useful"], counts["ahead"]
    wanted = counts["hits"] + counts["misses"]
    return {
        "bytes_read": counts["bytes"],
        "cells": wanted,
        "cached": _share(counts["hits"] - useful, wanted),
        "read_ahead": _share(useful, wanted),
        "lookahead_recall": _share(useful, useful + counts["misses"]),
        "lookahead_precision": _share(useful, ahead),
    }


def kv_remarks(kv: SparseKv | None, counts: Counter[str]) -> Sequence[str]:
    """What is said of sparse attention in a closing line."""
    if kv is None:
        return []
    figures = kv_figures(counts)
    if not figures["cells"]:
        return [kv.describe()]
    return [kv.describe(), f"{figures['cached']:.0%} of those on disk cached, {figures['read_ahead']:.0%} read ahead"]


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
