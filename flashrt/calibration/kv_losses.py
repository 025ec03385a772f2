"""What choosing what to attend to costs in the end: perplexity of what follows a long prompt, on text held out.

Prompts attend to everything. So each text is prefilled once, up to its last quarter, which is then computed as decoding
computes it, for one share kept after the other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flashrt.budget.plan import Workload
from flashrt.calibration.windows import Windows
from flashrt.engine.engine import Engine
from flashrt.engine.loaded_pack import LoadedPack
from flashrt.engine.options import LoadOptions
from flashrt.engine.runtime import Runtime
from flashrt.kv import choice
from flashrt.kv.choice import Choice, SparseKv
from flashrt.labels import KvLabels, share_of
from flashrt.storage.atomic import write_atomically
from flashrt.storage.pack import Pack

KEEPS = ("1/4", "1/8", "1/16", "1/32")
EXACT = "1"
PROMPT = 0.75  # of a text

Progress = Callable[[int, int], None]


@dataclass(slots=True)
class Dial:
    """The share that is kept now."""

    keep: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Dialled(Choice):
    """A choice whose share may be changed from pass to pass. `shares` are what it is multiplied by."""

    dial: Dial = field(default_factory=Dial)

    def share(self, head: int) -> float:
        return 1.0 if self.dial.keep >= 1 else self.shares[head] * self.dial.keep


def dialled(labels: KvLabels, dial: Dial) -> SparseKv:
    """What `labels` choose where the share is kept that `dial` says: planned for any, if that keeps everything."""
    layers = (
        None if layer is None else Dialled(layer, labels.block, shares, choice.LEAST, dial)
        for layer, shares in zip(labels.layers, labels.shares, strict=True)
    )
    return SparseKv(dial.keep, None, tuple(layers))


@dataclass(frozen=True, slots=True)
class Losses:
    """Measures them on `windows`, each of up to `length` tokens; what is found is kept in the file `path`."""

    base: Pack
    options: LoadOptions
    runtime: Runtime
    windows: Windows
    length: int
    path: Path

    def measure(self, labels: KvLabels, progress: Progress) -> dict[str, float]:
        """Rises of perplexity, by the share kept."""
        keeps = (EXACT, *KEEPS)
        names = [f"{n} {keep}" for n in range(len(self.windows)) for keep in keeps]
        found: dict[str, float] = json.loads(self.path.read_bytes()) if self.path.exists() else {}
        if set(found) != set(names):
            self._complete(found, labels, progress)
        total = sum(len(window) - prompt_of(window) - 1 for window in self.windows)
        sums = {keep: sum(found[f"{n} {keep}"] for n in range(len(self.windows))) for keep in keeps}
        return {keep: math.expm1((sums[EXACT] - sums[keep]) / total) for keep in KEEPS}

    def _complete(self, found: dict[str, float], labels: KvLabels, progress: Progress) -> None:
        """Add the log-probabilities that are not known yet, and write down each as it is found."""
        dial, keeps = Dial(), (EXACT, *KEEPS)
        model = LoadedPack(self.base, self.options, self.runtime, kv=dialled(labels, dial))
        with model.load(Workload(self.length, prompt=self.length, scoring=True)) as engine:
            for n, window in enumerate(self.windows):
                for i, keep in enumerate(keeps):
                    if (name := f"{n} {keep}") not in found:
                        dial.keep = share_of(keep)
                        found[name] = after_prompt(engine, window, prompt_of(window))
                        write_atomically(self.path, json.dumps(found).encode())
                    progress(n * len(keeps) + i + 1, len(self.windows) * len(keeps))


def prompt_of(window: Sequence[int]) -> int:
    """Tokens of a text that are prefilled."""
    return max(int(PROMPT * len(window)), 1)


def after_prompt(engine: Engine, window: Sequence[int], prompt: int) -> float:
    """The sum of the log-probabilities (nats) of what follows the first `prompt` tokens, computed as decoding does.

    What comes first of it is not predicted. The sequence may hold the prompt already.
    """
    runner, sequence = engine.runner, engine.sequence
    held = sequence.tokens[: sequence.length][:prompt] == list(window[:prompt])
    if not held or sequence.rewind(prompt) < prompt:
        sequence.rewind(0)
        runner.prefill(sequence, window[:prompt])
    return runner.score(sequence, window, wide=False, held=prompt)
