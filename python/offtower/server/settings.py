"""Settings of the server."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import get_args

from offtower.errors import ConfigError
from offtower.retrieval.propensity_sampler import Mode

TOKEN_VARIABLE = "OFFTOWER_SERVE_TOKEN"
MIN_TOKEN = 16
"""Characters of a token; fewer are guessed too easily."""


@dataclass(frozen=True)
class Limits:
    """What one request, and all that wait, may take.

    Raises:
        ConfigError: a limit is not positive.
    """

    body_bytes: int = 4 << 20
    """Of a request; larger ones are refused with 413."""
    contexts: int = 1000
    """Of a request."""
    k: int = 1000
    """Items of a context."""
    waiting: int = 10_000
    """Contexts that wait for an answer; further requests are refused with 503."""
    timeout_seconds: float = 5.0
    """For the arrival of a body, and for the wait until its answer is begun. A request that waited
    longer is refused before anything is drawn for it."""

    def __post_init__(self) -> None:
        _positive(self)


@dataclass(frozen=True)
class DecisionSettings:
    """Where and how the decisions of `/sample` are logged.

    Raises:
        ConfigError: a number is not positive.
    """

    log: str
    """Folder, or address of one in an object store."""
    spool: Path | None = None
    """Local folder for the files that are being written; by default that of the log."""
    rotate_seconds: float = 60.0
    rotate_bytes: int = 64 << 20
    """Size at which a file is closed before its time, as Arrow: Parquet is smaller."""

    def __post_init__(self) -> None:
        _positive(self)


@dataclass(frozen=True)
class ServerSettings:
    """What is served, and how.

    Raises:
        ConfigError: a number is out of range.
    """

    run: Path
    """A run directory, its export folder, or a version's folder."""
    decisions: DecisionSettings | None = None
    """None logs nothing."""
    limits: Limits = field(default_factory=Limits)
    batch_milliseconds: float = 2.0
    """How long the first request of a batch waits for others where the retriever is idle."""
    batch_contexts: int = 256
    """Contexts of one call of the retriever."""
    mode: Mode = "softmax"
    """How `/sample` draws; see `retrieval.propensity_sampler`."""
    poll_seconds: float = 2.0
    """How often CURRENT and the file of the token are read; 0 leaves it to `POST /reload`."""
    token_file: Path | None = None

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ConfigError(f"mode must be one of {', '.join(get_args(Mode))}, got '{self.mode}'")
        if self.batch_milliseconds < 0 or self.poll_seconds < 0 or self.batch_contexts < 1:
            raise ConfigError(
                "batch_milliseconds and poll_seconds must not be negative, and batch_contexts must "
                f"be positive, got {self.batch_milliseconds}, {self.poll_seconds} and "
                f"{self.batch_contexts}"
            )


class Token:
    """The token that requests must bear, from a file or from OFFTOWER_SERVE_TOKEN; None asks for
    none. The file may be replaced while the server runs.

    Raises:
        ConfigError: the file cannot be read, or the token is short or not printable ASCII.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self.value: str | None = None
        self.refresh()

    def refresh(self) -> None:
        """Read the token again.

        Raises:
            ConfigError: see the class; the token before then stays.
        """
        if self._file is None:
            text = os.environ.get(TOKEN_VARIABLE)
            source = f"the environment variable {TOKEN_VARIABLE}"
        else:
            source = f"the token file '{self._file}'"
            try:
                text = self._file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"{source} cannot be read: {error}") from error
        if text is None:
            return
        text = text.strip()
        if len(text) < MIN_TOKEN or not (text.isascii() and text.isprintable()) or " " in text:
            raise ConfigError(
                f"{source} must hold at least {MIN_TOKEN} printable ASCII characters without "
                "spaces; make one with: openssl rand -hex 32"
            )
        self.value = text


def _positive(settings: Limits | DecisionSettings) -> None:
    for one in fields(settings):
        value = getattr(settings, one.name)
        if isinstance(value, int | float) and not value > 0:
            raise ConfigError(f"{one.name} must be positive, got {value}")
