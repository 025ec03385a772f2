"""Who gets which byte of the budget: a pure function from a pack's layout and a budget to a plan.

Order of claim in exact mode: the process itself, KV for the asked context and the buffers of a pass, because nothing
runs without them; then weights, the small ones that every token needs first (router, attention, head), then FFN rows
spread evenly over the layers, so that every layer streams the same share and compute overlaps all of it; embeddings
last, since a token needs one row of them.

Experts of a mixture get slots of a whole expert each, for a cache, once everything else is resident: as many as fit,
and at least those that a token needs in two layers, so that one can be read for while the other computes. Where fewer
fit, leading blocks of experts are pinned instead and the rest streams.

Where neurons are predicted, the predictors come first as well, and the FFN's memory is divided into hot rows and
windows (`flashrt.budget.claims.rows`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flashrt.budget.claims.adaptive import index_bytes, longest
from flashrt.budget.claims.rows import RowMemory, divide_windows, predictor_work_bytes
from flashrt.budget.working_set import working_set
from flashrt.config import GIB
from flashrt.errors import BudgetError
from flashrt.kv.base import KvLimits
from flashrt.kv.cache import KINDS, KvKinds, kv_bytes
from flashrt.spec import ModelSpec
from flashrt.storage.layout import PAGE, PREDICTOR, PackLayout, TensorLayout
from flashrt.storage.reader import STAGING_BYTES
from flashrt_kernels.rows import align

MIB = 1 << 20
CHUNKS = (512, 256, 128, 64, 32, 16)  # tokens per prefill pass, the best first
RESIDENT_CHUNK = 64  # a shorter pass computes too slowly to be worth holding all weights for
CHUNK_SHARE = 0.08  # of what the process leaves free: a larger chunk may not take more than this from the weights
RING_SLOTS = (24, 16, 12, 8, 4, 2)  # blocks in flight or in use, the best first; 24 read 11-25% faster than 12 here
RING_SHARE = 1 / 16  # of what weights may take that the ring may have at most
LOOKUP_BYTES = 28  # of a token of context, for finding it again
VECTOR_STEP = 16  # float32 numbers in a cache line
PEAK_JITTER = 3 * MIB  # by which the process differs from run to run: the budget that is named must suffice
SLACK_BASE = 6 * MIB  # page tables, thread stacks, the allocator's rounding
OWNERS = {"qkv": "attention", "out": "attention", "router": "router", "channels": "FFN", "down": "FFN"}  # by kind
SLACK_SHARE = 0.012  # and what grows with the budget


@dataclass(frozen=True, slots=True)
class Workload:
    """What a run asks for."""

    context: int  # positions of KV
    prompt: int | None = None  # tokens of the longest prompt, when known: no pass is longer
    logit_rows: int = 1
    scoring: bool = False
    max_draft_tokens: int = 1  # tokens of a pass that verifies a draft, at most; 1: nothing is drafted


@dataclass(frozen=True, slots=True)
class FixedCosts:
    """What the process costs before any weight is loaded, and what the kernels need."""

    runtime_bytes: int  # resident on the budgeted device once everything but the model is loaded
    peak_bytes: int  # the largest that this has been
    kv_item_bytes: int
    scratch_bytes: Callable[[int, int], int]  # kernels' scratch, of (tokens of a pass, context)
    supports_gather: bool = True  # whether its kernels take neurons from several places at once
    kv_kinds: KvKinds = KINDS  # stores that keys and values may be kept in


@dataclass(frozen=True, slots=True)
class Plan:
    """A feasible division of the budget. `owners` sums to `budget_bytes`; `pinned` maps tensor → leading blocks.

    `windows` maps the FFNs whose neurons are cached one by one to the slots that they have beside pinned rows.
    """

    budget_bytes: int
    context: int
    prefill_chunk: int
    logit_rows: int
    scoring: bool
    owners: Mapping[str, int]
    pinned: Mapping[str, int]
    ring_slots: int
    slot_bytes: int
    expert_slots: int
    expert_slot_bytes: int
    weight_bytes: int
    pinned_bytes: int  # of weights in memory, slots of experts included
    streamed_bytes_per_token: int
    windows: Mapping[str, int] = field(default_factory=dict)
    row_reads_per_token: float = 0.0
    row_bytes_per_token: int = 0  # of the streamed ones, those of rows
    max_draft_tokens: int = 1  # tokens of a pass that verifies a draft, at most
    adaptive_ffns: tuple[str, ...] = ()  # dense FFNs whose resident neurons are those that the text uses

    @property
    def resident(self) -> bool:
        """Whether decoding reads nothing from disk."""
        return self.streamed_bytes_per_token == 0

    def to_json(self) -> dict[str, Any]:
        return {
            "budget_bytes": self.budget_bytes,
            "context": self.context,
            "prefill_chunk": self.prefill_chunk,
            "owners": dict(self.owners),
            "weight_bytes": self.weight_bytes,
            "pinned_bytes": self.pinned_bytes,
            "streamed_bytes_per_token": self.streamed_bytes_per_token,
            "positions_per_pass": self.max_draft_tokens,
            "row_reads_per_token": self.row_reads_per_token,
            "row_window_slots": sum(self.windows.values()),
            "ring_slots": self.ring_slots,
            "slot_bytes": self.slot_bytes,
            "expert_slots": self.expert_slots,
            "expert_slot_bytes": self.expert_slot_bytes,
        }


def plan(spec: ModelSpec, layout: PackLayout, budget_bytes: int, workload: Workload, costs: FixedCosts) -> Plan:
    """Divide `budget_bytes`. Raises BudgetError, with the smallest budget that would do, when it cannot be done."""
    return _Planner(spec, layout, workload, costs).plan(budget_bytes)


def smallest_budget(spec: ModelSpec, layout: PackLayout, workload: Workload, costs: FixedCosts) -> int:
    """Bytes of the smallest budget for which `plan` succeeds."""
    return _Planner(spec, layout, workload, costs).smallest()


def resident_budget(spec: ModelSpec, layout: PackLayout, workload: Workload, costs: FixedCosts) -> int:
    """Bytes of the smallest budget with which decoding reads nothing from disk."""
    return _Planner(spec, layout, workload, costs).enough()


def host_tier(spec: ModelSpec, layout: PackLayout, device_plan: Plan, host_bytes: int) -> dict[str, int]:
    """Leading blocks of each tensor that a GPU's host keeps in `host_bytes`, those on the GPU counted in.

    Embeddings are left on disk: a token needs one row of them.
    """
    tensors = [t for t in layout.tensors.values() if owner_of(spec, t) != "embeddings"]
    return _spread(tensors, host_bytes, device_plan.pinned)


class _Planner:
    def __init__(self, spec: ModelSpec, layout: PackLayout, workload: Workload, costs: FixedCosts) -> None:
        self.spec, self.layout, self.workload, self.costs = spec, layout, workload, costs
        self.predictors = [t for t in layout.tensors.values() if PREDICTOR in t.name]
        self.tensors = [t for t in layout.tensors.values() if PREDICTOR not in t.name]
        self.rows = [RowMemory(layout.tensors[f"{i}.ffn"], rows) for i, rows in enumerate(layout.rows)]
        self.weight_bytes = sum(t.nbytes for t in self.tensors)
        self.slot_bytes = align(max(t.max_block_bytes for t in layout.tensors.values()), PAGE)
        self.experts = [t for t in self.tensors if owner_of(spec, t) == "experts"]
        self.expert_bytes = max((t.run_stride * t.stride for t in self.experts), default=0)

    def plan(self, budget: int) -> Plan:
        if budget < self.smallest() - PEAK_JITTER:
            raise BudgetError(self._refusal(budget))
        chunk = self._chunk(budget)
        fixed = self._fixed(chunk) | {"slack": slack_bytes(budget)}
        free = budget - sum(fixed.values())
        slots, expert_slots = 0, self._expert_slots(free)
        if free < self.weight_bytes and not expert_slots:
            slots = next(
                n for n in RING_SLOTS if self._ring_bytes(n) <= max(free * RING_SHARE, self._ring_bytes(RING_SLOTS[-1]))
            )
            fixed["stream buffers"] = self._ring_bytes(slots)
            free -= fixed["stream buffers"]
            if self.rows:
                fixed["row index"] = self._index_bytes()
                free -= fixed["row index"]
            if drafting := self._drafting_bytes():
                fixed["speculation"] += drafting
                free -= drafting
        cached = expert_slots * self.expert_bytes
        pinned, windows = self._pin(free - cached)
        weights = self._weights_by_owner(pinned, windows)
        if cached:
            weights["experts"] = weights.get("experts", 0) + cached
        owners = fixed | weights
        owners["slack"] += budget - sum(owners.values())
        reads = {r.tensor.name: self._row_reads(r, pinned, windows) for r in self.rows}
        row_bytes = sum(r.read_bytes(reads[r.tensor.name]) for r in self.rows)
        streamed = [t for t in self.tensors if t.name not in reads]
        return Plan(
            budget_bytes=budget,
            context=self.workload.context,
            prefill_chunk=chunk,
            logit_rows=self._logit_rows,
            scoring=self.workload.scoring,
            owners=owners,
            pinned=pinned | {t.name: t.blocks for t in self.predictors},
            ring_slots=slots,
            slot_bytes=self.slot_bytes if slots else 0,
            expert_slots=expert_slots,
            expert_slot_bytes=self.expert_bytes if expert_slots else 0,
            weight_bytes=self.weight_bytes,
            pinned_bytes=cached + sum(prefix_bytes(t, pinned[t.name]) for t in self.tensors),
            streamed_bytes_per_token=row_bytes + sum(self._streamed(t, pinned[t.name], expert_slots) for t in streamed),
            windows=windows,
            row_reads_per_token=sum(reads.values()),
            row_bytes_per_token=row_bytes,
            max_draft_tokens=self.workload.max_draft_tokens,
            adaptive_ffns=self._adaptive_ffns(pinned),
        )

    def smallest(self) -> int:
        """Everything streamed through the smallest ring and windows, in the smallest chunk."""
        fixed = sum(self._fixed(CHUNKS[-1]).values()) + self._least_moving()
        budget = max(int((fixed + SLACK_BASE) / (1 - SLACK_SHARE)) + PAGE, self.costs.peak_bytes + SLACK_BASE)
        return align(budget + PEAK_JITTER, PAGE)

    def enough(self) -> int:
        """Everything resident, in the longest pass that is of use: speed, not the last MiB, is what is asked for."""
        chunk = next(c for c in CHUNKS if not self._too_long(c))
        fixed = sum(self._fixed(chunk).values()) + self.weight_bytes
        return max(align(int((fixed + SLACK_BASE) / (1 - SLACK_SHARE)) + PAGE, PAGE), self.smallest())

    def _fixed(self, chunk: int) -> dict[str, int]:
        """What nothing runs without, slack aside."""
        spec, workload = self.spec, self.workload
        codec = self.layout.tensors["embed"].codec
        columns = self.layout.channel_columns
        buffers = working_set(spec, codec, chunk, self._logit_rows, workload.scoring, columns)
        scratch = self.costs.scratch_bytes(chunk, workload.context)
        optional = {"predictors": self._predictor_bytes(), "speculation": self._lookup_bytes()}
        return {owner: nbytes for owner, nbytes in optional.items() if nbytes} | {
            "process": self.costs.runtime_bytes,
            "norms and biases": vector_bytes(self.layout),
            "KV": kv_bytes(spec, KvLimits(workload.context, chunk), self.costs.kv_item_bytes, self.costs.kv_kinds),
            "activations": sum(b.nbytes for b in buffers.values()) + scratch,
            "embedding reads": self.slot_bytes + STAGING_BYTES,
        }

    def _chunk(self, budget: int) -> int:
        """The longest pass that is of use and leaves all weights resident, or else takes no more than its share."""
        limit = CHUNK_SHARE * (budget - self.costs.runtime_bytes)
        fixed = {chunk: self._fixed(chunk) for chunk in CHUNKS if not self._too_long(chunk)}
        free = {chunk: budget - slack_bytes(budget) - sum(parts.values()) for chunk, parts in fixed.items()}
        enough = min(RESIDENT_CHUNK, max(fixed))
        resident = [chunk for chunk in free if self.weight_bytes <= free[chunk] and chunk >= enough]
        within = [
            chunk
            for chunk, parts in fixed.items()
            if self._least_moving() <= free[chunk] and parts["activations"] <= limit
        ]
        return max(resident or within, default=CHUNKS[-1])

    def _too_long(self, chunk: int) -> bool:
        """Whether a pass half as long would do as well."""
        useful = self.workload.prompt or self.workload.context
        return chunk > CHUNKS[-1] and chunk // 2 >= useful

    def _ring_bytes(self, slots: int) -> int:
        rings = 2 if any(t.runs > 1 for t in self.tensors) else 1
        return rings * slots * self.slot_bytes

    def _expert_slots(self, free: int) -> int:
        """Experts that fit beside all else that a token needs; 0 where all of them fit, or too few to cache."""
        others = sum(t.nbytes for t in self.tensors if owner_of(self.spec, t) not in ("experts", "embeddings"))
        if not self.experts or sum(t.nbytes for t in self.experts) <= free - others:
            return 0
        slots = max(free - others, 0) // self.expert_bytes
        return slots if slots >= 2 * max(layer.ffn.experts_per_token for layer in self.spec.layers) else 0

    def _pin(self, free: int) -> tuple[dict[str, int], dict[str, int]]:
        """Leading blocks of each tensor, and slots beside them of those whose rows are cached."""
        pinned: dict[str, int] = {}
        windows: dict[str, int] = {}
        free -= self._least_windows()
        for owner, tier in self._tiers():
            if owner == "FFN":
                free += self._least_windows()
            share = _spread(tier, free - (self._wanted_windows(tier, free) if owner == "FFN" else 0))
            free -= sum(prefix_bytes(t, share[t.name]) for t in tier)
            pinned |= share
            if owner == "FFN" and self.rows:
                windows = self._windows(pinned, free)
                free -= sum(r.tensor.stride * windows.get(r.tensor.name, 0) for r in self.rows)
        return pinned, windows

    def _wanted_windows(self, tier: list[TensorLayout], free: int) -> int:
        """Bytes of the windows that are worth more than pinned rows."""
        if sum(t.nbytes for t in tier) <= free:
            return 0
        return min(sum(r.wanted * r.tensor.stride for r in self.rows), free)

    def _windows(self, pinned: Mapping[str, int], free: int) -> dict[str, int]:
        """Slots of windows in `free` bytes, for the layers that are not pinned whole."""
        parts = [r for r in self.rows if pinned[r.tensor.name] < r.tensor.blocks]
        held = {r.tensor.name: prefix_bytes(r.tensor, pinned[r.tensor.name]) for r in parts}
        return divide_windows(parts, held, free)

    def _row_reads(self, rows: RowMemory, pinned: Mapping[str, int], windows: Mapping[str, int]) -> float:
        """Rows of a layer that one token reads, as calibration text did."""
        return rows.missed(prefix_bytes(rows.tensor, pinned[rows.tensor.name]), windows.get(rows.tensor.name, 0))

    @property
    def _logit_rows(self) -> int:
        return max(self.workload.logit_rows, self.workload.max_draft_tokens)

    def _lookup_bytes(self) -> int:
        """What drafts by looking up the text take; see `speculate.lookup`."""
        return LOOKUP_BYTES * self.workload.context if self.workload.max_draft_tokens > 1 else 0

    def _drafting_bytes(self) -> int:
        """What drafts by resident neurons take: where each of them is, and of what use."""
        followed = self._followable()
        return sum(index_bytes(t) for t in followed) + 4 * longest(followed)

    def _followable(self) -> list[TensorLayout]:
        """Dense FFNs of a pack that is run exactly, where neurons can be gathered."""
        if (
            self.workload.max_draft_tokens == 1
            or not self.costs.supports_gather
            or self.rows
            or self.layout.channel_columns
        ):
            return []
        return [t for t in self.tensors if owner_of(self.spec, t) == "FFN"]

    def _adaptive_ffns(self, pinned: Mapping[str, int]) -> tuple[str, ...]:
        """Those of which a part streams; none unless a draft finds neurons of every layer, and all else, resident."""
        followed = self._followable()
        needed = [t for t in self.tensors if owner_of(self.spec, t) in ("router", "attention", "head")]
        if self.experts or any(pinned[t.name] < t.blocks for t in needed) or any(not pinned[t.name] for t in followed):
            return ()
        return tuple(t.name for t in followed if pinned[t.name] < t.blocks)

    def _least_moving(self) -> int:
        """Bytes without which nothing can be read while decoding."""
        moving = self._ring_bytes(RING_SLOTS[-1]) + self._index_bytes() + self._least_windows()
        return moving + self._drafting_bytes()

    def _least_windows(self) -> int:
        return sum(r.least * r.tensor.stride for r in self.rows)

    def _index_bytes(self) -> int:
        return sum(r.index_bytes for r in self.rows)

    def _predictor_bytes(self) -> int:
        work = sum(predictor_work_bytes(r.tensor.run_bundles, r.sparsity.rank, self.spec.hidden) for r in self.rows)
        return work + sum(t.nbytes for t in self.predictors)

    def _tiers(self) -> Iterable[tuple[str, list[TensorLayout]]]:
        """Owners and their tensors, in order of claim."""
        groups: dict[str, list[TensorLayout]] = {}
        for tensor in self.tensors:
            groups.setdefault(owner_of(self.spec, tensor), []).append(tensor)
        for owner in ("router", "attention", "head", "FFN", "experts", "embeddings"):
            yield owner, groups.get(owner, [])

    def _weights_by_owner(self, pinned: Mapping[str, int], windows: Mapping[str, int]) -> dict[str, int]:
        result: dict[str, int] = {}
        for tensor in self.tensors:
            owner = owner_of(self.spec, tensor)
            nbytes = prefix_bytes(tensor, pinned[tensor.name]) + windows.get(tensor.name, 0) * tensor.stride
            result[owner] = result.get(owner, 0) + nbytes
        return {owner: nbytes for owner, nbytes in result.items() if nbytes}

    def _streamed(self, tensor: TensorLayout, pinned: int, expert_slots: int) -> int:
        """Bytes of a tensor that one token reads, on average over its experts.

        A cache counts as if routers chose at random, which is the worst for it: any other choice has favourites.
        """
        rest = tensor.nbytes - prefix_bytes(tensor, pinned)
        owner = owner_of(self.spec, tensor)
        if owner == "embeddings":
            return 0 if rest == 0 else PAGE
        if owner == "experts":
            ffn = self.spec.layers[int(tensor.name.partition(".")[0])].ffn
            missing = sum(t.runs for t in self.experts) - expert_slots
            return rest * ffn.experts_per_token * missing // (ffn.experts * (missing + expert_slots))
        return rest

    def _refusal(self, budget: int) -> str:
        smallest = self.smallest()
        fixed = self._fixed(CHUNKS[-1]) | {"stream buffers": self._ring_bytes(RING_SLOTS[-1])}
        if self.rows:
            fixed["row windows"] = self._least_windows() + self._index_bytes()
        parts = ", ".join(f"{name} {nbytes / MIB:.0f} MiB" for name, nbytes in sorted(fixed.items(), key=_by_size))
        hint = "a shorter --context needs less" if fixed["KV"] > smallest // 10 else "use a larger --budget-gb"
        if self.costs.peak_bytes + SLACK_BASE + PEAK_JITTER + PAGE >= smallest:
            parts = f"loading the program and the tokenizer alone took {self.costs.peak_bytes / MIB:.0f} MiB; {parts}"
        return (
            f"a budget of {budget / GIB:.3f} GiB is too small for a context of {self.workload.context} tokens: "
            f"the smallest that would do is {ceil_gib(smallest):.3f} GiB ({parts}). {hint[0].upper()}{hint[1:]}"
        )


def owner_of(spec: ModelSpec, tensor: TensorLayout) -> str:
    """Under whose name the bytes of a tensor stand in the plan."""
    if tensor.name == spec.head:
        return "head"
    if PREDICTOR in tensor.name:
        return "predictors"
    kind = tensor.name.rpartition(".")[2]
    if kind == "ffn":
        return "experts" if tensor.runs > 1 else "FFN"
    return OWNERS.get(kind, "embeddings")


def vector_bytes(layout: PackLayout) -> int:
    """Bytes of all vectors, each starting on a cache line."""
    return sum(4 * align(vector.length, VECTOR_STEP) for vector in layout.vectors.values())


def ceil_gib(nbytes: int) -> float:
    """Bytes as GiB, rounded up to three digits, so that the figure printed is one that suffices."""
    return -(-nbytes * 1000 // GIB) / 1000


def slack_bytes(budget: int) -> int:
    """What is left unowned on purpose."""
    return SLACK_BASE + int(SLACK_SHARE * budget)


def _by_size(item: tuple[str, int]) -> int:
    return -item[1]


def prefix_bytes(tensor: TensorLayout, blocks: int) -> int:
    """Bytes of the first `blocks` blocks of a tensor."""
    if blocks == 0:
        return 0
    last = tensor.block(blocks - 1)
    return last.offset + last.nbytes - tensor.offset


def _spread(tensors: list[TensorLayout], free: int, have: Mapping[str, int] | None = None) -> dict[str, int]:
    """Leading blocks of each tensor that fit in `free` bytes together, the same share of every tensor.

    `have` blocks of each are held elsewhere already and cost nothing. Blocks come in one order whatever `free` is, and
    the first that does not fit ends it: so more memory never holds less.
    """
    share = {t.name: have[t.name] if have else 0 for t in tensors}
    if sum(t.nbytes - prefix_bytes(t, share[t.name]) for t in tensors) <= free:
        return {t.name: t.blocks for t in tensors}
    order = sorted((block / t.blocks, i) for i, t in enumerate(tensors) for block in range(share[t.name], t.blocks))
    for _, i in order:
        name, blocks = tensors[i].name, share[tensors[i].name]
        free -= prefix_bytes(tensors[i], blocks + 1) - prefix_bytes(tensors[i], blocks)
        if free < 0:
            break
        share[name] = blocks + 1
    return share
