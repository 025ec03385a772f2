"""flashrt serve: a model for programs, over HTTP."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashrt.cli import options
from flashrt.cli.console import say
from flashrt.engine.options import LoadOptions
from flashrt.errors import UsageError

if TYPE_CHECKING:
    from flashrt.engine.engine import Engine

MIB = 1 << 20


def register(app: typer.Typer, name: str, guarded: Callable[..., Any]) -> None:
    app.command(name)(guarded(serve))


@options.loads(*(name for name in options.LOAD if name != "session"))
def serve(
    pack: options.Model,
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Where to listen; beyond this machine it takes a key.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, metavar="N", help="0 takes a free one, and says which.")
    ] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            "--api-key-file",
            metavar="FILE",
            show_default=False,
            help="Holds the key that clients must send. Omitted: that in FLASHRT_API_KEY, or none.",
        ),
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Let other machines in without a key.")] = False,
    name: Annotated[
        list[str] | None,
        typer.Option(
            "--name", metavar="NAME", show_default=False, help="Answer to this model name too; may be repeated."
        ),
    ] = None,
    queue: Annotated[int, typer.Option("--queue", min=0, metavar="N", help="Requests that may wait.")] = 16,
    timeout_s: Annotated[
        float, typer.Option("--timeout-s", metavar="S", help="Seconds that a request may take, waiting included.")
    ] = 3600.0,
    grace_s: Annotated[
        float, typer.Option("--grace-s", metavar="S", help="Seconds that SIGTERM leaves requests to end.")
    ] = 10.0,
    max_body_mb: Annotated[
        float | None,
        typer.Option(
            "--max-body-mb",
            metavar="MIB",
            show_default=False,
            help="Longest request. Omitted: 1, or 16 bytes a token of context.",
        ),
    ] = None,
    *,
    load: LoadOptions,
) -> None:
    """Answer OpenAI's clients on this machine: /v1/chat/completions, /v1/completions, /v1/models.

    What the budget bounds is the whole process, server included. SIGTERM and Ctrl-C end it; requests that go on have
    the grace period.

    Example: flashrt serve demo --budget-gb 1
    """
    try:
        from flashrt.server.options import KEY_VARIABLE, ServerOptions, read_key
        from flashrt.server.serving import MODULES, listen
        from flashrt.server.serving import serve as run_server
    except ImportError as error:
        raise UsageError(f"flashrt serve needs {error.name}: install flashrt[serve]") from None
    server = ServerOptions(
        host=host,
        port=port,
        key=read_key(api_key_file, os.environ.pop(KEY_VARIABLE, None)),
        insecure=insecure,
        names=tuple(name or ()),
        queue=queue,
        seconds=timeout_s,
        grace=grace_s,
        body_bytes=None if max_body_mb is None else int(max_body_mb * MIB),
    )
    from flashrt.budget.plan import Workload
    from flashrt.cli import session
    from flashrt.server.app import build
    from flashrt.server.assemble import assemble
    from flashrt.server.memory import request_bytes

    listener = listen(server.host, server.port)
    model = session.open_model(pack, load, MODULES)
    body = server.longest_body(model.context)

    def loaded() -> Engine:
        requests = request_bytes(body, model.context, server.queue)
        engine = session.load(model, Workload(model.context, scoring=True, request_bytes=requests))
        service.metrics.planned(engine.plan)
        say(f"ready: {service.name}, context {model.context} tokens")
        return engine

    service = assemble(model, server, loaded)
    address, number = listener.getsockname()[:2]
    where = f"http://[{address}]:{number}" if ":" in address else f"http://{address}:{number}"
    with listener:
        run_server(service, build(service), listener, lambda: say(f"listening on {where}"))
