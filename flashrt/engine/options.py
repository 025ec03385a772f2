"""What a user asks of a run beside the model: the same for `flashrt.load`, the command line and calibration."""

from __future__ import annotations

import os
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashrt.config import (
    GIB,
    LARGEST_BUDGET_GB,
    MOST_THREADS,
    budget_bytes,
    checked_loss,
    number,
    parse_keep,
    parse_speculate,
    whole,
)
from flashrt.errors import UsageError
from flashrt.rope import RopeScaling, parse_rope_scaling
from flashrt.storage.names import AUTO, DTYPE_NAMES, default_cache
from flashrt_kernels.kv import KvCodec

DEFAULT_SESSION_GB = 16.0
CHOICES = {
    "dtype": DTYPE_NAMES,
    "device": ("cpu", "cuda"),
    "mode": ("exact", "sparse"),
    "kv": ("exact", "sparse"),
}
KV_DTYPES = tuple(codec.value for codec in KvCodec)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadOptions:
    """What `flashrt.load` explains. Fields are checked here, before anything is opened.

    Raises UsageError for a field of a wrong type or out of range, and for fields that contradict each other.
    """

    budget_gb: float | None = None
    context: int | None = None
    dtype: str = AUTO
    cache_dir: str | Path | None = None
    threads: int | None = None
    device: str = "cpu"
    host_budget_gb: float | None = None
    mode: str = "exact"
    max_loss: float | None = None
    speculate: str | int = "auto"
    draft: str | Path | None = None
    kv: str = "exact"
    kv_dtype: str | None = None
    kv_keep: str | float | None = None
    kv_dir: str | Path | None = None
    rope_scaling: str | None = None
    experts_used: int | None = None
    session: str | Path | None = None
    session_dir: str | Path | None = None
    session_gb: float | None = None

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            _check_choice(name, getattr(self, name), choices)
        if self.kv_dtype is not None:
            _check_choice("kv_dtype", self.kv_dtype, KV_DTYPES)
        for budget in (self.budget_gb, self.host_budget_gb):
            if budget is not None:
                budget_bytes(budget)
        if self.session_gb is not None:
            number("session_gb", self.session_gb, 0.0, LARGEST_BUDGET_GB)
        if self.context is not None:
            whole("the context", self.context, 1)
        if self.threads is not None:
            whole("threads", self.threads, 1, MOST_THREADS)
        for name in ("cache_dir", "draft", "kv_dir", "session", "session_dir"):
            if getattr(self, name) is not None:
                checked_path(name, getattr(self, name))
        parse_speculate(self.speculate)
        if self.kv_keep is not None:
            parse_keep(self.kv_keep)
        if self.experts_used is not None:
            whole("--experts-used", self.experts_used, 1)
        if self.rope_scaling is not None:
            parse_rope_scaling(self.rope_scaling)
        self._check_together()

    def _check_together(self) -> None:
        """Refuse options that contradict each other."""
        if self.host_budget_gb is not None and self.device == "cpu":
            raise UsageError("a host budget is for --device cuda; on the CPU the budget bounds the whole process")
        if self.max_loss is not None:
            if self.mode == self.kv == "exact":
                raise UsageError("--max-loss needs --mode sparse or --kv sparse: exact mode loses nothing")
            checked_loss(self.max_loss)
            if self.kv_dtype is not None and KvCodec(self.kv_dtype).blocks:
                raise UsageError(f"--max-loss bounds no loss of --kv-dtype {self.kv_dtype}: that was not measured")
            if self.experts_used is not None:
                raise UsageError("--max-loss cannot be promised with --experts-used, whose loss was not measured")
        if self.kv_keep is not None and self.kv == "exact":
            raise UsageError("--kv-keep needs --kv sparse: exact attention keeps everything")
        if self.kv == "sparse" and self.device != "cpu":
            raise UsageError("--kv sparse computes on the CPU only: use --device cpu")
        if self.kv_dtype is not None and self.device != "cpu":
            raise UsageError("--kv-dtype is for --device cpu: a GPU holds keys and values as it does")
        if self.draft is not None and self.max_draft_tokens == 1:
            raise UsageError("--draft needs drafts: leave --speculate off out")
        if self.draft is not None and self.device != "cpu":
            raise UsageError("--draft computes on the CPU only: use --device cpu")
        if (self.session is not None or self.session_dir is not None) and self.device != "cpu":
            raise UsageError("sessions are saved from the CPU only: use --device cpu")
        if self.session_gb is not None and self.session_dir is None:
            raise UsageError("--session-gb needs --session-dir, which it bounds")

    @property
    def budget(self) -> int | None:
        """Bytes; None: what the model needs, or what the machine has."""
        return None if self.budget_gb is None else budget_bytes(self.budget_gb)

    @property
    def session_bytes(self) -> int:
        """Bytes that the directory of sessions may take."""
        return int((DEFAULT_SESSION_GB if self.session_gb is None else self.session_gb) * GIB)

    @property
    def cache(self) -> Path:
        """The directory where checkpoints, packs and measurements are kept."""
        return default_cache() if self.cache_dir is None else Path(self.cache_dir)

    @property
    def kv_folder(self) -> Path:
        """The directory for keys and values that do not fit in memory."""
        return self.cache if self.kv_dir is None else Path(self.kv_dir)

    @property
    def keep(self) -> float | None:
        """The share of positions that sparse attention keeps; None: as the loss allows, or 1/16."""
        return None if self.kv_keep is None else parse_keep(self.kv_keep)

    @property
    def scaling(self) -> RopeScaling | None:
        """What the rotary embedding is scaled by, in place of the model's own scaling; None: as the model says."""
        return None if self.rope_scaling is None else parse_rope_scaling(self.rope_scaling)

    @property
    def max_draft_tokens(self) -> int | None:
        """Tokens of a pass that verifies a draft, at most; None: as many as pay."""
        return parse_speculate(self.speculate)


def checked_path(name: str, value: Any) -> Path:
    """Raises UsageError for what is neither a text nor a path, and for an empty one."""
    path = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(path, str) or not path:
        raise UsageError(f"{name} is {reprlib.repr(value)}, expected a path")
    return Path(path)


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise UsageError(f"unknown {name} {reprlib.repr(value)}: expected {', '.join(choices[:-1])} or {choices[-1]}")
