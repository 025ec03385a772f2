"""What a run asks of a budget, and the division of it that the planner answers with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from flashrt.kv.base import KvLimits
from flashrt.kv.cache import KINDS, Choices, KvKinds
from flashrt.kv.choice import SparseKv
from flashrt.kv.far_layout import FarLayout
from flashrt.storage.layout import PackLayout
from flashrt_kernels.kv import KvCodec


@dataclass(frozen=True, slots=True)
class Workload:
    """What a run asks for."""

    context: int  # positions of KV
    prompt: int | None = None  # tokens of the longest prompt, when known: no pass is longer
    logit_rows: int = 1
    scoring: bool = False
    max_draft_tokens: int = 1  # tokens of a pass that verifies a draft, at most; 1: nothing is drafted
    kv: SparseKv | None = None  # how decode passes choose what they attend to; None: they attend to everything
    request_bytes: int = 0  # that requests take beside the model: what a server reads and writes
    sequences: int = 1  # that are held at a time, each of `context` positions
    ahead_bytes: int = 0  # of the layer that predicts further tokens, which is planned by itself

    @property
    def choices(self) -> Choices:
        """How each layer chooses."""
        return () if self.kv is None else self.kv.layers


@dataclass(frozen=True, slots=True)
class FixedCosts:
    """What the process costs before any weight is loaded, and what the kernels need."""

    runtime_bytes: int  # resident on the budgeted device once everything but the model is loaded
    peak_bytes: int  # the largest that this has been
    kv_codec: KvCodec  # how keys and values are held
    scratch_bytes: Callable[[int, int], int]  # kernels' scratch, of (tokens of a pass, context)
    supports_gather: bool = True  # whether its kernels take neurons from several places at once
    kv_kinds: KvKinds = KINDS  # stores that keys and values may be kept in
    kv_scratch_bytes: Callable[[KvLimits, Choices], int] = lambda limits, choices: 0  # what these need of the scratch


@dataclass(frozen=True)
class TierPlan:
    """What one kind of FFN got of the budget, beside the leading blocks that are pinned; kinds add fields of theirs."""

    nbytes: int = 0  # charged to the owner of the kind's weights
    loaded_bytes: int = 0  # of these, what loading fills with weights
    slots: Mapping[str, int] = field(default_factory=dict)  # of a bundle each, behind the pinned ones of a tensor
    reads: Mapping[str, int] = field(default_factory=dict)  # tensor → bytes a token reads, where not all that streams
    scattered_reads: float = 0.0  # reads that `reads` are made by, where each is a row of its own
    reads_in_place: bool = False  # whether blocks are read into memory of the kind's while tokens are computed
    drafts: bool = False  # whether what is resident can draft

    def to_json(self) -> dict[str, Any]:
        """Figures of the kind for `flashrt plan --json`."""
        return {}

    def lines(self, size: Callable[[float], str]) -> dict[str, str]:
        """Lines for `flashrt plan`, by their label; `size` writes bytes for people."""
        return {}


Tier = TypeVar("Tier", bound=TierPlan)


@dataclass(frozen=True, slots=True)
class Plan:
    """A feasible division of the budget. `owners` sums to `budget_bytes`; `pinned` maps tensor → leading blocks."""

    budget_bytes: int
    context: int
    prefill_chunk: int
    logit_rows: int
    scoring: bool
    owners: Mapping[str, int]
    pinned: Mapping[str, int]
    ring_slots: int
    slot_bytes: int
    weight_bytes: int
    pinned_bytes: int  # of weights that loading reads, into tiers included
    streamed_bytes_per_token: int  # at the end of the context, where no cell of keys and values is there already
    tiers: Mapping[str, tuple[TierPlan, ...]] = field(default_factory=dict)  # by the owner whose weights they are for
    max_draft_tokens: int = 1  # tokens of a pass that verifies a draft, at most
    kv: SparseKv | None = None  # see `Workload`
    kv_held: int | None = None  # see `KvLimits`
    far: FarLayout | None = None  # pages of keys and values that do not fit in memory; None: all do
    kv_cells: int = 0  # cells of these that memory holds, where tokens choose what they attend to
    kv_cell_bytes_per_token: int = 0  # of the cells that a token chooses at the end of the context
    kv_codec: KvCodec = KvCodec.BF16
    sequences: int = 1  # see `Workload`

    @property
    def kv_limits(self) -> KvLimits:
        """What stores of keys and values must hold."""
        cell_bytes = 0 if self.far is None else self.far.cell_bytes
        return KvLimits(self.context, self.prefill_chunk, held=self.kv_held, cell_bytes=cell_bytes, codec=self.kv_codec)

    @property
    def kv_disk_bytes(self) -> int:
        """Keys and values on disk at the end of the context."""
        return 0 if self.far is None else self.far.nbytes

    @property
    def choices(self) -> Choices:
        """How each layer chooses what it attends to."""
        return () if self.kv is None else self.kv.layers

    @property
    def resident(self) -> bool:
        """Whether decoding reads nothing from disk."""
        return self.streamed_bytes_per_token == 0

    def pins_all(self, layout: PackLayout) -> bool:
        """Whether every weight is in memory, at the place that its tensor has there."""
        beside = any(tier.loaded_bytes for tier in self.all_tiers)
        return not beside and all(self.pinned[tensor.name] == tensor.blocks for tensor in layout.tensors.values())

    @property
    def all_tiers(self) -> list[TierPlan]:
        return [tier for tiers in self.tiers.values() for tier in tiers]

    def tier(self, kind: type[Tier]) -> Tier:
        """The tier of one kind; an empty one where no claim made one."""
        return next((tier for tier in self.all_tiers if isinstance(tier, kind)), kind())

    def slots(self, tensor: str) -> int:
        """Bundles that the memory of a tensor has room for behind the pinned ones."""
        return sum(tier.slots.get(tensor, 0) for tier in self.all_tiers)

    @property
    def drafts(self) -> bool:
        """Whether resident weights can draft."""
        return any(tier.drafts for tier in self.all_tiers)

    @property
    def reads_in_place(self) -> bool:
        """Whether blocks are read beside the ring while tokens are computed."""
        return any(tier.reads_in_place for tier in self.all_tiers)

    @property
    def scattered_reads_per_token(self) -> float:
        """Reads of single rows and cells by which a token brings `scattered_bytes_per_token`."""
        cells = self.kv_cell_bytes_per_token // self.far.cell_bytes if self.far and self.far.cell_bytes else 0
        return cells + sum(tier.scattered_reads for tier in self.all_tiers)

    @property
    def scattered_bytes_per_token(self) -> int:
        """Of the bytes that a token reads, those of single rows and cells."""
        rows = sum(sum(tier.reads.values()) for tier in self.all_tiers if tier.scattered_reads)
        return self.kv_cell_bytes_per_token + rows

    def to_json(self) -> dict[str, Any]:
        figures = {
            "budget_bytes": self.budget_bytes,
            "context": self.context,
            "sequences": self.sequences,
            "prefill_chunk": self.prefill_chunk,
            "owners": dict(self.owners),
            "weight_bytes": self.weight_bytes,
            "pinned_bytes": self.pinned_bytes,
            "streamed_bytes_per_token": self.streamed_bytes_per_token,
            "positions_per_pass": self.max_draft_tokens,
            "ring_slots": self.ring_slots,
            "slot_bytes": self.slot_bytes,
            "kv_bytes": self.owners["KV"],
            "kv_disk_bytes": self.kv_disk_bytes,
            "kv_cells": self.kv_cells,
            "kv_cell_bytes": 0 if self.far is None else self.far.cell_bytes,
            "kv_cell_bytes_per_token": self.kv_cell_bytes_per_token,
            "kv_dtype": self.kv_codec.value,
            "kv_keep": None if self.kv is None else self.kv.keep,
            "kv_loss": None if self.kv is None else self.kv.loss,
        }
        for tier in self.all_tiers:
            figures |= tier.to_json()
        return figures
