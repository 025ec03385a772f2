"""What the page shows of the budget, as it is now."""

from __future__ import annotations

from typing import Any

from flashrt.machine.process import peak_resident_bytes, resident_bytes
from flashrt.server.service import Service

_LAST = ("decode_tok_per_s", "bytes_read_per_token", "tokens_per_pass", "acceptance", "disk_roofline_share")
_PLANNED = ("budget_bytes", "owners", "weight_bytes", "pinned_bytes", "streamed_bytes_per_token", "kv_disk_bytes")


def status(service: Service) -> dict[str, Any]:
    """Of the plan, the process, the queue, and the last answer."""
    engine, last = service.worker.engine, service.metrics.last
    found: dict[str, Any] = {
        "model": service.name,
        "ready": engine is not None,
        "context": service.prompts.context,
        "resident_bytes": resident_bytes(),
        "peak_resident_bytes": peak_resident_bytes(),
        "waiting": service.queue.length,
        "running": service.queue.running,
        "last": None if last is None else {name: getattr(last, name) for name in _LAST},
    }
    if engine is not None:
        plan = engine.plan.to_json()
        found |= {name: plan[name] for name in _PLANNED}
    return found
