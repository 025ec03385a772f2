"""Tiny engines: packs with small blocks, and plans with budgets far below what a real process takes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from flashrt.budget.claims.registry import CLAIMS
from flashrt.budget.ledger import Ledger
from flashrt.budget.plan import FixedCosts, Plan, Workload
from flashrt.budget.planner import PEAK_JITTER, Claims, host_tier, plan, resident_budget, smallest_budget
from flashrt.cache.torch_device import TorchDevice, arena_bytes
from flashrt.calibration.pipeline import Request, calibrate
from flashrt.engine.build import build_engine, load_tokenizer
from flashrt.engine.engine import Engine
from flashrt.engine.options import LoadOptions
from flashrt.engine.runtime import Runtime, kv_codec, runtime_for, torch_scratch_bytes
from flashrt.errors import UsageError
from flashrt.kv.base import KvLimits, KvStore
from flashrt.kv.cache import KINDS as KV_KINDS
from flashrt.kv.cache import Choices
from flashrt.model.ffn.choose import KINDS, Kinds
from flashrt.sparsity import Sparsity
from flashrt.storage.manifest import SPARSE_DIR
from flashrt.storage.pack import Pack
from flashrt.storage.packer import pack
from flashrt.storage.reader import Reader
from flashrt.storage.sources import open_checkpoint
from flashrt_kernels import ops
from flashrt_kernels.kv import KvCodec
from flashrt_kernels.rows import Codec

BLOCK_BYTES = 16 << 10  # so that even tiny tensors have several blocks


def make_pack(checkpoint: Path, out: Path, dtype: Codec) -> Pack:
    with open_checkpoint(checkpoint) as source:
        source.validate()
        pack(source, out, dtype, block_bytes=BLOCK_BYTES)
    return Pack(out)


def tiny_plan(
    packed: Pack,
    runtime: Runtime,
    share: float,
    context: int = 96,
    chunk: int | None = None,
    claims: Claims = CLAIMS,
    stream_kv: bool = False,
    kv_codec: KvCodec | None = None,
    **workload: object,
) -> Plan:
    """A plan as if the process itself took nothing, that pins about `share` of the weights (1: all of them).

    kv_codec: how keys and values are held, where not as the runtime has it
    stream_kv: whether keys and values leave memory where they can; what a share beyond 1 leaves holds some of these
    """
    costs = runtime.fixed_costs(packed)
    machine = replace(costs, runtime_bytes=0, peak_bytes=0, kv_codec=kv_codec or costs.kv_codec)
    wanted = Workload(context=context, prompt=chunk, **workload)  # type: ignore[arg-type]
    arguments = (packed.spec, packed.layout)
    if share >= 1 and not stream_kv:
        return plan(*arguments, resident_budget(*arguments, wanted, machine, claims), wanted, machine, claims)
    weights = sum(t.nbytes for t in packed.layout.tensors.values())
    least = smallest_budget(*arguments, wanted, machine, claims, stream_kv) - PEAK_JITTER
    return plan(*arguments, least + int(share * weights), wanted, machine, claims)


def tiny_engine(
    packed: Pack, share: float, runtime: Runtime | None = None, kinds: Kinds = KINDS, **plan_options: object
) -> Engine:
    runtime = runtime or runtime_for("cpu", threads=2)
    the_plan = tiny_plan(packed, runtime, share, **plan_options)  # type: ignore[arg-type]
    return build_engine(packed, the_plan, load_tokenizer(packed), runtime, kinds=kinds)


def back_to(engine: Engine, prompt: list[int]) -> None:
    """Cut the sequence back to `prompt`, or compute it again where a recurrent layer cannot be cut back so far."""
    if engine.sequence.rewind(len(prompt)) < len(prompt):
        engine.runner.prefill(engine.sequence, prompt)


def held_of(engine: Engine) -> list[np.ndarray]:
    """What each layer keeps of the sequence: keys and values, or the state at its end."""
    kv, result = engine.sequence.kv, []
    for i, store in enumerate(kv.stores):
        if i in kv.recurrent:
            result.append(np.empty(engine.spec.delta_nets[i].state_size, np.float32))
            kv.recurrent[i].read_state(kv.length, slice(0, len(result[-1])), result[-1])
        elif isinstance(store, KvStore):
            result.append(store.memory[:, : kv.length].copy())  # type: ignore[attr-defined]
    return result


def logits_of(engine: Engine, prompt: list[int], tokens: list[int]) -> np.ndarray:
    """Logits after the prompt and after each of `tokens`, float32 [1 + len(tokens), vocab]."""
    engine.sequence.rewind(0)
    rows = [engine.runner.prefill(engine.sequence, prompt).copy()]
    rows += [engine.runner.step(engine.sequence, token).copy() for token in tokens]
    return np.stack(rows)


def check_a_thinned_tree(engine: Engine, tokens: list[int]) -> None:
    """In sparse mode a tree has the bits of its paths, and needs the first tokens of a sequence before it."""
    engine.runner.prefill(engine.sequence, tokens[:9])
    found = engine.runner.step_tree(engine.sequence, tokens[9:14], [-1, 0, 0, -1, 2]).copy()
    for i, nodes in enumerate(([0], [0, 1], [0, 2], [3], [0, 2, 4])):
        engine.sequence.rewind(9)
        assert np.array_equal(
            engine.runner.step_batch(engine.sequence, [tokens[9 + node] for node in nodes])[-1], found[i]
        )
    engine.sequence.rewind(3)
    with pytest.raises(UsageError, match="needs 4"):
        engine.runner.step_tree(engine.sequence, tokens[3:5], [-1, -1])


def relative_rms(actual: np.ndarray, expected: np.ndarray) -> float:
    error = np.sqrt(np.mean((actual.astype(np.float64) - expected) ** 2))
    return float(error / np.sqrt(np.mean(np.asarray(expected, np.float64) ** 2)))


def killed_once_at_every_stage(path: Path, cache: Path, request: Request) -> tuple[Sparsity, set[str]]:
    """Calibrate, interrupted when each stage first reports, and started again; the result, and the stages."""
    seen: set[str] = set()

    def killing(stage: str, done: int, total: int) -> None:
        if stage not in seen:
            seen.add(stage)
            raise KeyboardInterrupt

    while True:
        try:
            return calibrate(path, LoadOptions(cache_dir=cache, threads=2), request, killing), seen
        except KeyboardInterrupt:
            assert not (path / SPARSE_DIR).exists()


class TorchRuntime:
    """The GPU's engine on a torch device of choice; on the CPU it runs without streams, as a reference.

    `host_share` is the share of the weights that the host tier holds.
    """

    bounds_process = False
    kv_kinds = KV_KINDS

    def __init__(self, name: str = "cpu", host_share: float = 0.0) -> None:
        self.ops, self.name, self.host_share = ops.load("torch"), name, host_share

    def fixed_costs(self, packed: Pack) -> FixedCosts:
        return FixedCosts(0, 0, kv_codec(packed), partial(self.scratch_bytes, packed))

    def kv_scratch_bytes(self, packed: Pack, limits: KvLimits, choices: Choices) -> int:
        return 0

    def scratch_bytes(self, packed: Pack, tokens: int, context: int) -> int:
        return torch_scratch_bytes(packed, tokens, context)

    def available(self) -> int:
        return 1 << 40

    def device(self, packed: Pack, the_plan: Plan, ledger: Ledger, reader: Reader) -> TorchDevice:
        host = int(self.host_share * the_plan.weight_bytes)
        blocks = host_tier(packed.spec, packed.layout, the_plan, host)
        arena = arena_bytes(the_plan, self.scratch_bytes(packed, the_plan.prefill_chunk, the_plan.context))
        return TorchDevice(self.ops, self.name, ledger, reader, arena, blocks)

    def peak_bytes(self) -> int | None:
        return None
