"""What a run did: figures for people and for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Report:
    """Figures of one generation. Times in seconds, sizes in bytes.

    `decode_*` and `disk_roofline_share` cover the passes after the first token; `disk_roofline_share` is the rate at
    which they read, as a share of the disk's measured sequential rate, None when they read nothing.
    """

    text: str
    token_ids: list[int]
    finish_reason: str  # 'eos', 'stop', 'length' or 'interrupted'
    prompt_tokens: int
    new_tokens: int
    load_s: float
    ttft_s: float
    decode_s: float
    decode_tok_per_s: float | None
    peak_rss_bytes: int
    device_peak_bytes: int | None
    budget_bytes: int
    bytes_read_total: int
    bytes_read_per_token: float
    io_wait_s: float
    compute_s: float
    disk_bytes_per_s: float | None
    disk_roofline_share: float | None
    plan: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
