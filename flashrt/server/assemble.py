"""From an open pack to a service."""

from __future__ import annotations

from collections.abc import Callable

from flashrt.engine.engine import Engine
from flashrt.engine.loaded_pack import LoadedPack
from flashrt.engine.recommended import recommended
from flashrt.server.desk import grammars_of, template_of
from flashrt.server.metrics import Metrics
from flashrt.server.options import ServerOptions
from flashrt.server.prompts import Prompts
from flashrt.server.queue import JobQueue
from flashrt.server.service import Service
from flashrt.server.worker import Worker


def assemble(model: LoadedPack, options: ServerOptions, load: Callable[[], Engine]) -> Service:
    """`load` makes the engine, once the server listens. Raises PackError for recommendations without sense."""
    tokenizer, generation = model.tokenizer, model.tokenizer.text.generation
    recommended(generation, {})  # what is refused is refused now
    queue, metrics = JobQueue(options.queue), Metrics()
    metrics.watch_queue(lambda: queue.length, lambda: queue.running)
    tokenizer.token_bytes(0)  # its table too is made before the process is measured
    return Service(
        options=options,
        name=model.pack.manifest.name,
        prompts=Prompts(tokenizer, template_of(model), model.spec.vocab, model.context),
        recommended=lambda given: recommended(generation, given),
        queue=queue,
        worker=Worker(load, queue, metrics.generated),
        metrics=metrics,
        grammars=grammars_of(model),
    )
