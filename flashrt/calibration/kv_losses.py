"""What choosing what to attend to costs in the end: perplexity on text held out, computed as decoding computes it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from flashrt.budget.plan import Workload
from flashrt.calibration.windows import Windows
from flashrt.engine.loaded_pack import LoadedPack
from flashrt.engine.options import LoadOptions
from flashrt.engine.runtime import Runtime
from flashrt.labels import KvLabels
from flashrt.storage.atomic import write_atomically
from flashrt.storage.pack import Pack

KEEPS = ("1/4", "1/8", "1/16", "1/32")
EXACT = "1"


@dataclass(frozen=True, slots=True)
class Losses:
    """Measures them on `windows`, each of up to `length` tokens; what is found is kept in the file `path`."""

    base: Pack
    options: LoadOptions
    runtime: Runtime
    windows: Windows
    length: int
    path: Path

    def measure(self, labels: KvLabels, progress: Callable[[int, int], None]) -> dict[str, float]:
        """Rises of perplexity, by the share kept."""
        found: dict[str, float] = json.loads(self.path.read_bytes()) if self.path.exists() else {}
        keeps = (EXACT, *KEEPS)
        for done, keep in enumerate(keeps):
            if keep not in found:
                found[keep] = self._perplexity(keep, labels)
                write_atomically(self.path, json.dumps(found).encode())
            progress(done + 1, len(keeps))
        return {keep: found[keep] / found[EXACT] - 1 for keep in KEEPS}

    def _perplexity(self, keep: str, labels: KvLabels) -> float:
        chosen = self.options if keep == EXACT else replace(self.options, kv="sparse", kv_keep=keep)
        model = LoadedPack(self.base, chosen, self.runtime, labels=labels)
        prefix = len(model.tokenizer.encode(""))
        ids = list(itertools.chain.from_iterable(window[prefix:] for window in self.windows))
        with model.load(Workload(self.length, prompt=self.length, scoring=True)) as engine:
            return engine.score(ids, self.length, as_decoded=True)[0]
