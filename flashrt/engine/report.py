"""What a run did: figures for people and for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol


class Outcome(Protocol):
    """What is said of an answer to whoever asked; a `Report` says more."""

    @property
    def finish_reason(self) -> str: ...
    @property
    def new_tokens(self) -> int: ...
    @property
    def resumed_tokens(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Report:
    """Figures of one generation. Times in seconds, sizes in bytes; the caller's own time is not counted.

    resumed_tokens        of the prompt, that were not computed: the conversation or a session had them
    load_s                allocating and reading what is pinned, once for all requests
    ttft_s                from the request to the first token; `flashrt run` loads meanwhile, `load` has loaded before
    decode_*              the passes after the first token
    decode_tok_per_s      tokens after the first by decode_s; None where there are none
    bytes_read_total      read from disk by this generation, loading left out
    bytes_read_per_token  of these, what was read after the first token, by the tokens that came then
    io_wait_s             compute waiting for reads, in prefill and decode; compute_s is the rest of their time
    disk_bytes_per_s      rate at which decode passes read; None where they read nothing but rows of embeddings
    disk_roofline_share   rate at which decode passes read, as a share of the best that is known of the disk, this run
                          included; None when they read nothing but rows of embeddings
    kv_keep, kv_loss      the share of tokens that sparse attention keeps, and the rise of perplexity measured for it;
                          None with exact attention, the loss also where it was not measured
    loss                  the rise of perplexity that sparse mode was calibrated to stay below; None in exact mode
    tokens_per_pass       that the passes after the first token gave, and positions_per_pass that they computed; None
                          where there were none
    acceptance            of the passes with a draft of depth 1, 2, .., the share in which a token of that depth stood;
                          None where nothing is drafted
    draft_s, verify_s     time of decode_s that went into drafting, and into the passes
    peak_rss_bytes        the largest resident set of the process, as the kernel counted it; device_peak_bytes the most
                          memory on a GPU, None on the CPU
    plan                  figures of the plan (see `Plan.to_json`)
    kv                    of the passes after the first token, what was read of keys and values (see `kv_figures`)
    ffn                   figures of the kinds of feed-forward blocks (see `FfnKind.figures`), in `to_json` each under
                          its own name; None where the model has no such blocks
    remarks               what these come to, for the closing line
    """

    text: str
    token_ids: list[int]
    finish_reason: str  # 'eos', 'stop', 'length' or 'interrupted'
    prompt_tokens: int
    resumed_tokens: int
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
    mode: str
    loss: float | None
    kv_keep: float | None
    kv_loss: float | None
    tokens_per_pass: float | None
    positions_per_pass: float | None
    acceptance: list[float] | None
    draft_s: float
    verify_s: float
    plan: dict[str, Any]
    kv: dict[str, Any]
    ffn: Mapping[str, Any]
    remarks: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        figures = asdict(self)
        del figures["remarks"]
        return figures | figures.pop("ffn")
