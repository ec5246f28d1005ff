"""The HTTP server as a deployment of Ray Serve.

    serve run offtower.jobs.serve:application run=runs/mine log=served

Each replica runs the application of `offtower serve`, with an export, batches and files of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from offtower.errors import ConfigError, MissingExtraError
from offtower.jobs.resources import import_ray


@dataclass(frozen=True)
class ServeArguments:
    """Arguments of the application, as in the section `args` of a Serve configuration; their
    meaning is that of the options of `offtower serve`."""

    run: str
    log: str | None = None
    spool: str | None = None
    token_file: str | None = None
    mode: str = "softmax"
    rotate_seconds: float = 60.0
    batch_ms: float = 2.0
    batch_contexts: int = 256
    poll: float = 2.0

    def build(self) -> Any:
        """Open the export and return the ASGI application."""
        from offtower.retrieval.propensity_sampler import Mode
        from offtower.server.app import Server
        from offtower.server.settings import DecisionSettings, ServerSettings, Token

        decisions = None
        if self.log is not None:
            spool = None if self.spool is None else Path(self.spool)
            decisions = DecisionSettings(self.log, spool, float(self.rotate_seconds))
        file = None if self.token_file is None else Path(self.token_file)
        settings = ServerSettings(
            Path(self.run),
            decisions,
            batch_milliseconds=float(self.batch_ms),
            batch_contexts=int(self.batch_contexts),
            mode=cast(Mode, self.mode),
            poll_seconds=float(self.poll),
            token_file=file,
        )
        return Server(settings, Token(file)).application()


def application(args: dict[str, Any]) -> Any:
    """Return the Serve application for a Serve configuration or `serve run`.

    Args:
        args: fields of `ServeArguments`; relative paths start at the folder of the replica.

    Raises:
        ConfigError: an argument is unknown, or `run` is missing.
        MissingExtraError: Ray Serve is not installed.
    """
    import_ray()
    try:
        from ray import serve
    except ImportError as error:
        raise MissingExtraError(error.name or "ray", "ray", "Ray Serve") from error
    try:
        given = ServeArguments(**args)
    except TypeError as error:
        raise ConfigError(f"args of the Serve application: {error}") from None

    def build() -> Any:
        return given.build()

    # Requests wait in the server's own queue, which answers them in batches.
    deployment = serve.deployment(name="offtower", max_ongoing_requests=512)
    return deployment(serve.ingress(build)()).bind()
