"""Tiny engines: packs with small blocks, and plans with budgets far below what a real process takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from flashrt.budget.planner import Machine, Plan, Workload, plan, resident_budget, smallest_budget
from flashrt.engine.build import build_engine, load_tokenizer
from flashrt.engine.engine import Engine
from flashrt.engine.runtime import Runtime, runtime_for
from flashrt.storage.pack import Pack
from flashrt.storage.packer import pack
from flashrt.storage.sources import open_checkpoint
from flashrt_kernels.rows import Codec

BLOCK_BYTES = 16 << 10  # so that even tiny tensors have several blocks


def make_pack(checkpoint: Path, out: Path, dtype: Codec) -> Pack:
    with open_checkpoint(checkpoint) as source:
        source.validate()
        pack(source, out, dtype, block_bytes=BLOCK_BYTES)
    return Pack(out)


def tiny_plan(
    packed: Pack, runtime: Runtime, share: float, context: int = 96, chunk: int | None = None, **workload: object
) -> Plan:
    """A plan as if the process itself took nothing, that pins about `share` of the weights (1: all of them)."""
    machine = replace(runtime.machine(packed), runtime_bytes=0, peak_bytes=0)
    wanted = Workload(context=context, prompt=chunk, **workload)  # type: ignore[arg-type]
    arguments = (packed.spec, packed.layout)
    if share >= 1:
        return plan(*arguments, resident_budget(*arguments, wanted, machine), wanted, machine)
    weights = sum(t.nbytes for t in packed.layout.tensors.values())
    return plan(*arguments, smallest_budget(*arguments, wanted, machine) + int(share * weights), wanted, machine)


def tiny_engine(packed: Pack, share: float, runtime: Runtime | None = None, **plan_options: object) -> Engine:
    runtime = runtime or runtime_for("cpu", threads=2)
    the_plan = tiny_plan(packed, runtime, share, **plan_options)  # type: ignore[arg-type]
    return build_engine(packed, the_plan, load_tokenizer(packed), runtime)


def logits_of(engine: Engine, prompt: list[int], tokens: list[int]) -> np.ndarray:
    """Logits after the prompt and after each of `tokens`, float32 [1 + len(tokens), vocab]."""
    engine.rewind(0)
    rows = [engine.prefill(prompt).copy()]
    rows += [engine.step(token).copy() for token in tokens]
    return np.stack(rows)


def relative_rms(actual: np.ndarray, expected: np.ndarray) -> float:
    error = np.sqrt(np.mean((actual.astype(np.float64) - expected) ** 2))
    return float(error / np.sqrt(np.mean(np.asarray(expected, np.float64) ** 2)))


__all__ = ["Machine", "logits_of", "make_pack", "relative_rms", "tiny_engine", "tiny_plan"]
