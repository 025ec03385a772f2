"""The layer that predicts further tokens as a pack holds it: what it takes of a budget, and how it is loaded."""

from __future__ import annotations

from dataclasses import replace

from flashrt.budget.plan import Plan, Workload
from flashrt.budget.planner import AHEAD, plan, resident_budget
from flashrt.engine.ahead import KEPT_STATES, NOTED, AheadModel
from flashrt.engine.build import build_engine
from flashrt.engine.engine import Engine
from flashrt.engine.runtime import Runtime
from flashrt.spec import ModelSpec
from flashrt.storage.layout import AHEAD_DIR, PackLayout
from flashrt.storage.pack import Pack, is_pack
from flashrt_kernels.kv import KvCodec

CHUNK = 128  # tokens of a prompt that the layer computes at a time: longer passes would take more memory
SHARE = 1 / 8  # of a budget that does not hold the model, that the layer may take at most


def ahead_pack(pack: Pack) -> Pack | None:
    """The layer that a pack holds beside the model."""
    return Pack(pack.path / AHEAD_DIR) if is_pack(pack.path / AHEAD_DIR) else None


def ahead_plan(pack: Pack, runtime: Runtime, context: int, codec: KvCodec) -> Plan:
    """All of the layer in memory, in a budget of its own that counts neither the process nor the model."""
    costs = replace(runtime.fixed_costs(pack), runtime_bytes=0, peak_bytes=0, kv_codec=codec)
    arguments, workload = (pack.spec, pack.layout), Workload(context, prompt=CHUNK)
    return plan(*arguments, resident_budget(*arguments, workload, costs), workload, costs)


def ahead_bytes(the_plan: Plan, hidden: int) -> int:
    """What the layer takes of the model's budget: its own, and what is noted of tokens that it has seen or will."""
    return the_plan.budget_bytes + NOTED * the_plan.context + 4 * hidden * KEPT_STATES


def pays(beside: Plan, spec: ModelSpec, layout: PackLayout) -> bool:
    """Whether a plan of the model beside the layer holds the head, without which no draft is had, and not much less.

    beside: with the layer's bytes in it
    """
    head = all(beside.pinned[part.name] == part.blocks for part in layout.parts(spec.head))
    return head and (beside.resident or beside.owners[AHEAD] <= SHARE * beside.budget_bytes)


def load_ahead(pack: Pack, the_plan: Plan, engine: Engine) -> None:
    """Load the layer beside `engine`, which it drafts for from then on, and which shows it every pass."""
    own = build_engine(pack, the_plan, engine.tokenizer, engine.runtime)
    engine.ahead = AheadModel(own.runner, own.sequence.kv, engine.runner, own.close)
    engine.runner.watch = engine.ahead.saw
