"""The thread that owns the engine: loads it, then computes one job after the other."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable

from flashrt.engine.engine import Engine
from flashrt.engine.report import Report
from flashrt.errors import FlashrtError
from flashrt.server.errors import ApiError, of_engine
from flashrt.server.job import Came, Ended, Failed, Job, Part, Scored
from flashrt.server.queue import JobQueue

Observe = Callable[[Report], None]


class Worker:
    """`load` makes the engine; `observe` is shown each report."""

    def __init__(self, load: Callable[[], Engine], queue: JobQueue, observe: Observe) -> None:
        self._load, self._queue, self._observe = load, queue, observe
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.engine: Engine | None = None  # once it is loaded
        self.failure: BaseException | None = None  # of loading
        self.on_failure: Callable[[], None] = lambda: None

    def start(self) -> None:
        self._thread.start()

    def join(self) -> None:
        """Wait for the end, which comes once the queue is closed and empty; not for a model that is being loaded."""
        if self.engine is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            engine = self._load()
        except BaseException as error:
            self.failure = error
            self.on_failure()
            return
        with engine:
            self.engine = engine
            while (job := self._queue.take()) is not None:
                began = time.monotonic()
                self._serve(engine, job)
                self._queue.done(time.monotonic() - began)
            self.engine = None

    def _serve(self, engine: Engine, job: Job) -> None:
        """Whatever happens, the next job is served."""
        try:
            for index, part in enumerate(job.parts):
                self._compute(engine, job, index, part)
        except _Cut:
            late = job.late and not job.gone
            status, why = (504, "the request took too long") if late else (503, "the request was cancelled")
            job.emit(Failed(ApiError(status, why, code="timeout" if late else "cancelled")))
        except FlashrtError as error:
            job.emit(Failed(answer := of_engine(error)))
            if answer.status >= 500:
                log(f"error: {error}")
        except Exception as error:
            job.emit(Failed(ApiError(500, "an internal error: the server's log says where", code="internal_error")))
            log_failure(error)

    def _compute(self, engine: Engine, job: Job, index: int, part: Part) -> None:
        prompt = part.prompt.tolist()
        if job.cancelled():
            raise _Cut
        if part.prompt_logprobs is not None:
            scores = engine.prompt_logprobs(prompt, part.prompt_logprobs, job.cancelled)
            if job.cancelled():
                raise _Cut
            job.emit(Scored(index, scores))
        if part.limit == 0:
            job.emit(Ended(index, None))
            return
        rules = job.rules
        generation = engine.generate(
            prompt,
            part.limit,
            part.sampling,
            stop=rules.stops,
            ignore_eos=rules.ignore_eos,
            reuse=True,
            top_logprobs=rules.top_logprobs,
            cancelled=job.cancelled,
            grammar=rules.grammar,
        )
        for token in generation:
            job.emit(Came(index, token))
        self._observe(generation.report)
        if generation.report.finish_reason == "interrupted":
            raise _Cut
        job.emit(Ended(index, generation.report))


class _Cut(Exception):
    """A job was cancelled, or is late."""


def log(text: str) -> None:
    """A line of the server's own words: nothing that a client sent."""
    print(text, file=sys.stderr, flush=True)


def log_failure(error: BaseException) -> None:
    """Where an error arose. Its text may quote a client, and is left out."""
    frames = traceback.extract_tb(error.__traceback__)
    where = " < ".join(f"{frame.name} ({frame.filename}:{frame.lineno})" for frame in reversed(frames[-6:]))
    log(f"internal error: {type(error).__name__} in {where}")
