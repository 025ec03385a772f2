"""What `/metrics` shows: figures of requests, of the engine and of the budget, in Prometheus' form."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from flashrt.budget.plan import Plan
from flashrt.engine.report import Report
from flashrt.machine.process import peak_resident_bytes, resident_bytes

CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    def __init__(self) -> None:
        disable_created_metrics()
        self.last: Report | None = None
        self._registry = CollectorRegistry()
        self.requests = self._counter("requests", "Requests answered, by route and status.", "route", "status")
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts, those that were not computed included.")
        self._resumed = self._counter("resumed_tokens", "Tokens of prompts that were not computed: they were there.")
        self._generated = self._counter("generated_tokens", "Tokens of answers.")
        self._read = self._counter("read_bytes", "Bytes that generations read from disk.")
        self._seconds = self._counter("engine_seconds", "Seconds of generations, by phase.", "phase")
        self._per_pass = self._gauge("tokens_per_pass", "Tokens that a pass gave, in the last answer that had passes.")
        self._stood = self._gauge(
            "draft_stood", "Share of drafts whose first token stood, in the last answer with drafts."
        )
        self._budget = self._gauge("budget_bytes", "Bytes of the budget, by owner.", "owner")
        self._gauge("resident_bytes", "Resident set of the process.").set_function(resident_bytes)
        self._gauge("resident_peak_bytes", "Largest resident set of the process.").set_function(peak_resident_bytes)

    def watch_queue(self, waiting: Callable[[], int], running: Callable[[], int]) -> None:
        self._gauge("requests_waiting", "Requests that wait for the engine.").set_function(waiting)
        self._gauge("requests_running", "Requests that the engine computes.").set_function(running)

    def planned(self, plan: Plan) -> None:
        """The plan that the engine was loaded by."""
        for owner, nbytes in plan.owners.items():
            self._budget.labels(owner).set(nbytes)

    def generated(self, report: Report) -> None:
        """A generation is over."""
        self.last = report
        self._prompt.inc(report.prompt_tokens)
        self._resumed.inc(report.resumed_tokens)
        self._generated.inc(report.new_tokens)
        self._read.inc(report.bytes_read_total)
        self._seconds.labels("prefill").inc(report.ttft_s)
        self._seconds.labels("decode").inc(report.decode_s)
        self._seconds.labels("waiting_for_reads").inc(report.io_wait_s)
        if report.tokens_per_pass:
            self._per_pass.set(report.tokens_per_pass)
        if report.acceptance:
            self._stood.set(report.acceptance[0])

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(f"flashrt_{name}", what, labels, registry=self._registry)

    def _gauge(self, name: str, what: str, *labels: str) -> Gauge:
        return Gauge(f"flashrt_{name}", what, labels, registry=self._registry)
