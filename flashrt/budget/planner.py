"""Who gets which byte of the budget: a pure function from a pack's layout and a budget to a plan.

Order of claim: the process itself, KV for the asked context and the buffers of a pass, because nothing runs without
them; then weights, the small ones that every token needs first (router, attention, head), then FFN rows spread evenly
over the layers, so that every layer streams the same share and compute overlaps all of it; embeddings last, since a
token needs one row of them. Where keys and values of the context do not fit even so, older ones lie on disk and stream
as weights do; then what weights leave holds some of these. Where tokens choose what they attend to, older ones lie on
disk unless memory holds everything, weights too. A cache holds what was chosen before: what a token chooses in one
layer at least, in all layers as far as that takes no more than half of what weights may have, and more of what weights
without the embeddings leave.

What a kind of FFN wants beside pinned blocks it says by a claim (`flashrt.budget.claims`), and is granted when the turn
of its weights has come.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from flashrt.budget.cells import CellClaim
from flashrt.budget.claims.base import Case, Claim
from flashrt.budget.claims.registry import CLAIMS
from flashrt.budget.owners import WEIGHTS, owner_of, prefix_bytes, vector_bytes
from flashrt.budget.plan import FixedCosts, Plan, TierPlan, Workload
from flashrt.budget.working_set import working_set
from flashrt.config import GIB
from flashrt.errors import BudgetError
from flashrt.kv.base import KvLimits
from flashrt.kv.cache import cells_chosen, far_layout, kv_bytes, kv_cell_bytes
from flashrt.kv.far_layout import FarLayout
from flashrt.kv.spill import SPILL_BUFFERS
from flashrt.spec import ModelSpec
from flashrt.storage.layout import PAGE, PackLayout, TensorLayout
from flashrt.storage.reader import STAGING_BYTES
from flashrt_kernels.rows import align, row_bytes

MIB = 1 << 20
CHUNKS = (512, 256, 128, 64, 32, 16)  # tokens per prefill pass, the best first
PROMPT_ROWS = 16  # of a pass that serve prompts, at least, where each sequence has a row
RESIDENT_CHUNK = 64  # a shorter pass computes too slowly to be worth holding all weights for
CHUNK_SHARE = 0.08  # of what the process leaves free: a larger chunk may not take more than this from the weights
FAR_CHUNK_SHARE = 0.2  # the same where every pass of a prompt reads the older keys and values again
RING_SLOTS = (24, 16, 12, 8, 4, 2)  # blocks in flight or in use, the best first; 24 read 11-25% faster than 12 here
RING_SHARE = 1 / 16  # of what weights may take that the ring may have at most
LOOKUP_BYTES = 28  # of a token of context, for finding it again
PEAK_JITTER = 3 * MIB  # by which the process differs from run to run: the budget that is named must suffice
AHEAD = "predicting layer"  # the owner of the layer that predicts further tokens
SLACK_BASE = 6 * MIB  # page tables, thread stacks, the allocator's rounding
SLACK_SHARE = 0.012  # and what grows with the budget

Claims = Sequence[Callable[[Case], Claim]]


def plan(
    spec: ModelSpec,
    layout: PackLayout,
    budget_bytes: int,
    workload: Workload,
    costs: FixedCosts,
    claims: Claims = CLAIMS,
) -> Plan:
    """Divide `budget_bytes`. Raises BudgetError, with the smallest budget that would do, when it cannot be done."""
    planners = _planners(Case(spec, layout, workload, costs), claims)
    able = [planner for planner in planners if budget_bytes >= planner.smallest() - PEAK_JITTER]
    if not able:
        raise BudgetError(min(planners, key=_Planner.smallest).refusal(budget_bytes))
    first = able[0].plan(budget_bytes)
    if len(able) == 1 or able[1].cells is None or first.streamed_bytes_per_token <= PAGE:
        return first
    other = able[1].plan(budget_bytes)  # of keys and values a token then reads a share, of weights everything
    return other if _kv_memory(other) < _kv_memory(first) else first


def smallest_budget(
    spec: ModelSpec,
    layout: PackLayout,
    workload: Workload,
    costs: FixedCosts,
    claims: Claims = CLAIMS,
    stream_kv: bool = True,
) -> int:
    """Bytes of the smallest budget for which `plan` succeeds.

    Without `stream_kv`, of the smallest with which all keys and values are in memory.
    """
    planners = _planners(Case(spec, layout, workload, costs), claims)
    return min(planner.smallest() for planner in (planners if stream_kv else planners[:1]))


def resident_budget(
    spec: ModelSpec, layout: PackLayout, workload: Workload, costs: FixedCosts, claims: Claims = CLAIMS
) -> int:
    """Bytes of the smallest budget with which decoding reads nothing from disk."""
    return _Planner(Case(spec, layout, workload, costs), claims).enough()


def host_tier(spec: ModelSpec, layout: PackLayout, device_plan: Plan, host_bytes: int) -> dict[str, int]:
    """Leading blocks of each tensor that a GPU's host keeps in `host_bytes`, those on the GPU counted in.

    Embeddings are left on disk: a token needs one row of them.
    """
    tensors = [t for t in layout.tensors.values() if owner_of(spec, t) != "embeddings"]
    return _spread(tensors, host_bytes, device_plan.pinned)


def _planners(case: Case, claims: Claims) -> list[_Planner]:
    """With all keys and values in memory; and where older ones of one sequence can stream, with these on disk."""
    if case.workload.sequences > 1:
        return [_Planner(case, claims)]
    resident, streaming = _Planner(case, claims), _Planner(case, claims, held=0)
    return [resident, streaming] if streaming.streams else [resident]


class _Planner:
    """`held` is that of `KvLimits`."""

    def __init__(self, case: Case, claims: Claims, held: int | None = None) -> None:
        self.case, self.spec, self.workload, self.held = case, case.spec, case.workload, held
        several = self.workload.sequences > 1
        self.chunks = [c for c in CHUNKS if not several or c >= self.workload.sequences + PROMPT_ROWS]
        self.least_chunk = self.chunks[-1]
        self.claims = [make(case) for make in claims]
        self.whole = {t.name: t.blocks for claim in self.claims for t in claim.whole}
        self.tensors = [t for t in case.layout.tensors.values() if t.name not in self.whole]
        self.weight_bytes = sum(t.nbytes for t in self.tensors)
        self.block_bytes = align(max(t.max_block_bytes for t in case.layout.tensors.values()), PAGE)
        choices, chooses = self.workload.choices, any(self.workload.choices)
        self.cell_bytes = kv_cell_bytes(self.spec, case.costs.kv_codec, choices) if held is not None else 0
        far = None if held is None or (chooses and not self.cell_bytes) else self.far(self.least_chunk)
        self.streams = far is not None
        self.page_bytes = 0 if far is None else far.largest
        self.cells = CellClaim.of(far, self._cells_chosen())
        self.slot_bytes = max(self.block_bytes, self.page_bytes)

    def far(self, chunk: int, held: int = 0) -> FarLayout | None:
        """Pages of keys and values on disk; `held` are those of a layer in memory."""
        limits, costs = self._limits(chunk, held), self.case.costs
        return far_layout(self.spec, limits, costs.kv_kinds, self.workload.choices)

    def plan(self, budget: int) -> Plan:
        """For a budget that is not below `smallest`, or hardly."""
        chunk = self._chunk(budget)
        fixed = self._fixed(chunk) | {"slack": slack_bytes(budget)}
        free = budget - sum(fixed.values())
        far, claim = self._far_of(chunk)
        free -= 0 if claim is None else claim.spare(free)
        slots = 0
        ring = free < self.weight_bytes and not any(claim.spares_ring(free) for claim in self.claims)
        if ring or far is not None:
            slots = self._ring_slots(free)
            moving = _added({"stream buffers": self._ring_bytes(slots)}, *(claim.moving() for claim in self.claims))
            fixed = _added(fixed, moving)
            free -= sum(moving.values())
        pinned, tiers = self._pin(free, ring, claim)
        owners = fixed | self._weights_by_owner(pinned, tiers)
        cells = 0
        if claim is not None:
            cells = claim.most(budget - sum(owners.values()) + owners["KV cells"])
            owners["KV cells"] = claim.nbytes(cells)
        held = self._hold(chunk, budget - sum(owners.values()))
        owners["KV"] = self._kv_bytes(chunk, held)
        owners["slack"] += budget - sum(owners.values())
        far = self.far(chunk, held) if self.streams else None
        chosen_bytes = 0 if claim is None else claim.chosen_bytes
        granted = [tier for own in tiers.values() for tier in own]
        return Plan(
            budget_bytes=budget,
            context=self.workload.context,
            prefill_chunk=chunk,
            logit_rows=self._logit_rows,
            scoring=self.workload.scoring,
            owners=owners,
            pinned=pinned | self.whole,
            ring_slots=slots,
            slot_bytes=self.slot_bytes if slots else 0,
            weight_bytes=self.weight_bytes,
            pinned_bytes=sum(prefix_bytes(t, pinned[t.name]) for t in self.tensors)
            + sum(tier.loaded_bytes for tier in granted),
            streamed_bytes_per_token=self._streamed(pinned, granted)
            + (0 if far is None else far.streamed_bytes + chosen_bytes),
            tiers=tiers,
            max_draft_tokens=self.workload.max_draft_tokens,
            kv=self.workload.kv,
            kv_held=None if self.held is None else held,
            far=far,
            kv_cells=cells,
            kv_cell_bytes_per_token=chosen_bytes,
            kv_codec=self.case.costs.kv_codec,
            sequences=self.workload.sequences,
        )

    def smallest(self) -> int:
        """Everything streamed through the smallest ring and windows, in the smallest chunk."""
        fixed = sum(self._fixed(self.least_chunk).values()) + self._least_moving()
        budget = max(int((fixed + SLACK_BASE) / (1 - SLACK_SHARE)) + PAGE, self.case.costs.peak_bytes + SLACK_BASE)
        return align(budget + PEAK_JITTER, PAGE)

    def enough(self) -> int:
        """Everything resident, in the longest pass that is of use: speed, not the last MiB, is what is asked for."""
        chunk = next(c for c in self.chunks if not self._too_long(c))
        fixed = sum(self._fixed(chunk).values()) + self.weight_bytes
        return max(align(int((fixed + SLACK_BASE) / (1 - SLACK_SHARE)) + PAGE, PAGE), self.smallest())

    def _fixed(self, chunk: int) -> dict[str, int]:
        """What nothing runs without, slack aside."""
        spec, layout, workload, costs = self.spec, self.case.layout, self.workload, self.case.costs
        buffers = working_set(spec, layout, chunk, self._logit_rows, workload.scoring)
        kv_scratch = costs.kv_scratch_bytes(self._limits(chunk), workload.choices)
        scratch = max(costs.scratch_bytes(chunk, workload.context), kv_scratch)
        drafting = workload.max_draft_tokens > 1
        lookup = {"speculation": LOOKUP_BYTES * workload.context} if drafting else {}  # see `speculate.lookup`
        far, claim = self._far_of(chunk)
        pages = {} if far is None else {"KV buffers": SPILL_BUFFERS * far.largest}
        cells = {} if claim is None else {"KV cells": claim.nbytes(claim.least)}
        requests = {"requests": workload.request_bytes} if workload.request_bytes else {}
        ahead = {AHEAD: workload.ahead_bytes} if workload.ahead_bytes else {}
        return _added(*(claim.fixed() for claim in self.claims), lookup, pages, cells, requests, ahead) | {
            "process": costs.runtime_bytes,
            "norms and biases": vector_bytes(layout),
            "KV": self._kv_bytes(chunk),
            "activations": sum(b.nbytes for b in buffers.values()) + scratch,
            "embedding reads": self.block_bytes + STAGING_BYTES,
        }

    def _limits(self, chunk: int, held: int = 0) -> KvLimits:
        held_pages = None if self.held is None else held
        context, codec = self.workload.context, self.case.costs.kv_codec
        return KvLimits(context, chunk, held=held_pages, cell_bytes=self.cell_bytes, codec=codec)

    def _far_of(self, chunk: int) -> tuple[FarLayout | None, CellClaim | None]:
        """Pages in passes of `chunk` tokens, none of them in memory, and what a cache of their cells asks for."""
        far = self.far(chunk) if self.streams else None
        return far, CellClaim.of(far, self._cells_chosen())

    def _cells_chosen(self) -> list[int]:
        limits, costs = self._limits(self.least_chunk), self.case.costs
        return cells_chosen(self.spec, limits, costs.kv_kinds, self.workload.choices)

    def _kv_bytes(self, chunk: int, held: int = 0) -> int:
        limits, costs = self._limits(chunk, held), self.case.costs
        return self.workload.sequences * kv_bytes(self.spec, limits, costs.kv_kinds, self.workload.choices)

    def _hold(self, chunk: int, free: int) -> int:
        """Pages of each layer that `free` bytes hold; some always stream, or else a store would hold everything.

        0 where a cache of cells takes what is left.
        """
        far = self.far(chunk) if self.streams and self.cells is None else None
        if far is None:
            return 0
        one = self._kv_bytes(chunk, 1) - self._kv_bytes(chunk)
        return max(min(free // one, far.count - 2), 0)

    def _chunk(self, budget: int) -> int:
        """The longest pass that is of use and leaves all weights resident, or else takes no more than its share."""
        share = FAR_CHUNK_SHARE if self.streams else CHUNK_SHARE
        limit = share * (budget - self.case.costs.runtime_bytes)
        fixed = {chunk: self._fixed(chunk) for chunk in self.chunks if not self._too_long(chunk)}
        free = {chunk: budget - slack_bytes(budget) - sum(parts.values()) for chunk, parts in fixed.items()}
        enough = min(RESIDENT_CHUNK, max(fixed))
        least = fixed[min(fixed)]["KV"]  # the KV of windows grows with the passes
        pages = self._least_moving() if self.page_bytes else 0
        resident = [chunk for chunk in free if self.weight_bytes + pages <= free[chunk] and chunk >= enough]
        within = [
            chunk
            for chunk, parts in fixed.items()
            if self._least_moving() <= free[chunk] and parts["activations"] + parts["KV"] - least <= limit
        ]
        return max(resident or within, default=self.least_chunk)

    def _too_long(self, chunk: int) -> bool:
        """Whether a pass half as long would do as well."""
        useful = self.workload.sequences * (self.workload.prompt or self.workload.context)
        return chunk > self.least_chunk and chunk // 2 >= useful

    def _ring_slots(self, free: int) -> int:
        """The most slots that take no more than their share."""
        most = max(free * RING_SHARE, self._ring_bytes(RING_SLOTS[-1]))
        return next(slots for slots in RING_SLOTS if self._ring_bytes(slots) <= most)

    def _ring_bytes(self, slots: int) -> int:
        return (1 + sum(claim.rings for claim in self.claims)) * slots * self.slot_bytes

    def _pin(
        self, free: int, ring: bool, cells: CellClaim | None
    ) -> tuple[dict[str, int], dict[str, tuple[TierPlan, ...]]]:
        """Leading blocks of each tensor, and by owner the tiers beside them."""
        pinned: dict[str, int] = {}
        tiers: dict[str, tuple[TierPlan, ...]] = {}
        free -= sum(claim.least() for claim in self.claims)
        for owner in WEIGHTS:
            tensors = [t for t in self.case.tensors(owner) if t.name not in self.whole]
            claims = [claim for claim in self.claims if claim.owner == owner]
            free += sum(claim.least() for claim in claims)
            if owner == "embeddings" and cells is not None:  # a token reads one row of these
                free = max(free - cells.beside_embeddings, 0)
            share = _spread(tensors, free - sum(claim.wanted(free, ring) for claim in claims))
            free -= sum(prefix_bytes(t, share[t.name]) for t in tensors)
            pinned |= share
            for claim in claims:
                tier = claim.grant(free, pinned, ring)
                free -= tier.nbytes
                tiers[owner] = (*tiers.get(owner, ()), tier)
        return pinned, tiers

    @property
    def _logit_rows(self) -> int:
        return max(self.workload.logit_rows, self.workload.max_draft_tokens, self.workload.sequences)

    def _least_moving(self) -> int:
        """Bytes without which nothing can be read while decoding."""
        claimed = sum(sum(claim.moving().values()) + claim.least() for claim in self.claims)
        return self._ring_bytes(RING_SLOTS[-1]) + claimed

    def _weights_by_owner(self, pinned: Mapping[str, int], tiers: Mapping[str, Sequence[TierPlan]]) -> dict[str, int]:
        held = [{owner_of(self.spec, t): prefix_bytes(t, pinned[t.name])} for t in self.tensors]
        beside = {owner: sum(tier.nbytes for tier in own) for owner, own in tiers.items()}
        return {owner: nbytes for owner, nbytes in _added(*held, beside).items() if nbytes}

    def _streamed(self, pinned: Mapping[str, int], tiers: Sequence[TierPlan]) -> int:
        """Bytes that one token reads."""
        told = {name: nbytes for tier in tiers for name, nbytes in tier.reads.items()}
        return sum(told.get(t.name, self._rest(t, pinned[t.name])) for t in self.tensors)

    def _rest(self, tensor: TensorLayout, pinned: int) -> int:
        """Bytes of a tensor that one token reads if it takes what is not pinned; of embeddings, a row."""
        rest = tensor.nbytes - prefix_bytes(tensor, pinned)
        row = align(row_bytes(tensor.codec, tensor.columns), PAGE)
        return min(rest, row) if owner_of(self.spec, tensor) == "embeddings" else rest

    @property
    def _asked(self) -> str:
        context, count = f"a context of {self.workload.context} tokens", self.workload.sequences
        return context if count == 1 else f"{count} sequences, each with {context}"

    def refusal(self, budget: int) -> str:
        """What is said of a budget that is too small."""
        smallest = self.smallest()
        fixed = _added(self._fixed(self.least_chunk), *(claim.moving() for claim in self.claims))
        fixed["stream buffers"] = self._ring_bytes(RING_SLOTS[-1])
        if least := sum(claim.least() for claim in self.claims):
            fixed["windows"] = least
        parts = ", ".join(f"{name} {nbytes / MIB:.0f} MiB" for name, nbytes in sorted(fixed.items(), key=_by_size))
        hint = "a shorter --context needs less" if fixed["KV"] > smallest // 10 else "use a larger --budget-gb"
        if any(self.workload.choices) and not self.cell_bytes and self.case.costs.kv_codec.blocks:
            hint += ", and with --kv-dtype bf16 older tokens are chosen on disk"
        peak = self.case.costs.peak_bytes
        if peak + SLACK_BASE + PEAK_JITTER + PAGE >= smallest:
            parts = f"loading the program and the tokenizer alone took {peak / MIB:.0f} MiB; {parts}"
        return (
            f"a budget of {budget / GIB:.3f} GiB is too small for {self._asked}: "
            f"the smallest that would do is {ceil_gib(smallest):.3f} GiB ({parts}). {hint[0].upper()}{hint[1:]}"
        )


def _kv_memory(the_plan: Plan) -> int:
    """Bytes of memory for keys and values."""
    return sum(nbytes for owner, nbytes in the_plan.owners.items() if owner.startswith("KV"))


def ceil_gib(nbytes: int) -> float:
    """Bytes as GiB, rounded up to three digits, so that the figure printed is one that suffices."""
    return -(-nbytes * 1000 // GIB) / 1000


def slack_bytes(budget: int) -> int:
    """What is left unowned on purpose."""
    return SLACK_BASE + int(SLACK_SHARE * budget)


def _added(*parts: Mapping[str, int]) -> dict[str, int]:
    """Sums by owner, in the order in which owners come first."""
    result: dict[str, int] = {}
    for part in parts:
        for owner, nbytes in part.items():
            result[owner] = result.get(owner, 0) + nbytes
    return result


def _by_size(item: tuple[str, int]) -> int:
    return -item[1]


def _spread(tensors: Sequence[TensorLayout], free: int, have: Mapping[str, int] | None = None) -> dict[str, int]:
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
