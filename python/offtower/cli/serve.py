"""Serve an export over HTTP: search, draws with propensities, and a log of the decisions.

A newer export is served as soon as it is current. SIGTERM answers open requests, finishes the files
of the log and ends. Only this machine reaches the server unless --host says otherwise; the token is
in the environment variable OFFTOWER_SERVE_TOKEN or in --token-file.

\b
Example:
  offtower serve runs/mine --log served
  curl http://127.0.0.1:8080/sample -H 'Content-Type: application/json' \\
    -d '{"contexts": [{"age": 31, "country": "fr"}]}'
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from offtower.cli.common import EXIT_REFUSED, TrustCode, escape, messages, verb


@verb
def serve(
    run: Annotated[Path, typer.Argument(help="Run directory or export.", metavar="RUN")],
    log: Annotated[
        str | None,
        typer.Option(help="Folder, or its address, for the decisions of /sample."),
    ] = None,
    spool: Annotated[
        Path | None,
        typer.Option(help="Local folder for files that are being written; by default LOG/.spool."),
    ] = None,
    rotate_seconds: Annotated[
        float, typer.Option(help="Finish a file of the log after this time.")
    ] = 60.0,
    rotate_mib: Annotated[int, typer.Option(help="Finish it at this size.")] = 64,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.", min=0, max=65535)] = 8080,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the token that requests must bear.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain (PEM).")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key (PEM).")] = None,
    mode: Annotated[
        Literal["softmax", "cells", "exact"],
        typer.Option(help="How to draw; see docs/reference/retrieval.md."),
    ] = "softmax",
    batch_ms: Annotated[
        float, typer.Option(help="How long a request waits for others to be answered with it.")
    ] = 2.0,
    batch_contexts: Annotated[int, typer.Option(help="Contexts that are answered together.")] = 256,
    max_contexts: Annotated[int, typer.Option(help="Contexts of a request.")] = 1000,
    max_k: Annotated[int, typer.Option(help="Items of a context.")] = 1000,
    max_body_mib: Annotated[int, typer.Option(help="Size of a request.")] = 4,
    timeout: Annotated[
        float, typer.Option(help="Seconds that a request may wait for its answer.")
    ] = 5.0,
    poll: Annotated[
        float, typer.Option(help="Seconds between looks for a newer export; 0: POST /reload only.")
    ] = 2.0,
    grace: Annotated[int, typer.Option(help="Seconds for open requests after SIGTERM.")] = 20,
    trust_code: TrustCode = None,
) -> None:
    import contextlib
    import logging
    import sys

    from offtower.server.process import Address, http_server
    from offtower.server.settings import DecisionSettings, Limits, ServerSettings

    decisions = None
    if log is not None:
        decisions = DecisionSettings(log, spool, rotate_seconds, rotate_mib << 20)
    settings = ServerSettings(
        run,
        decisions,
        Limits(
            body_bytes=max_body_mib << 20, contexts=max_contexts, k=max_k, timeout_seconds=timeout
        ),
        batch_ms,
        batch_contexts,
        mode,
        poll,
        token_file,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("offtower.server")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    address = Address(host, port, tls_cert, tls_key, grace_seconds=grace)
    server = http_server(settings, address)
    listening = address.listen()
    scheme = "http" if tls_cert is None else "https"
    name = f"[{host}]" if ":" in host else host
    where = "not logged" if log is None else f"logged in {log}"
    messages().print(
        escape(
            f"serving {run} at {scheme}://{name}:{listening.getsockname()[1]}; decisions are "
            f"{where}"
        ),
        soft_wrap=True,
    )
    # uvicorn raises the signal again after it has stopped.
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listening])
    if not server.started:
        raise typer.Exit(EXIT_REFUSED)
