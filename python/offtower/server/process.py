"""The server in one process, with uvicorn, until SIGTERM or SIGINT."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from offtower.errors import ConfigError, MissingExtraError
from offtower.server.settings import TOKEN_VARIABLE, ServerSettings, Token

if TYPE_CHECKING:
    import uvicorn


@dataclass(frozen=True)
class Address:
    """Where the server listens.

    Attributes:
        certificate, key: PEM files for TLS; None without.
        connections: at the same time; further ones get 503.
        grace_seconds: for open requests after SIGTERM.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    certificate: Path | None = None
    key: Path | None = None
    connections: int = 1024
    grace_seconds: int = 20

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def listen(self) -> socket.socket:
        """A socket that listens, at a free port where `port` is 0.

        Raises:
            OSError: the address is in use, or is not one of this machine.
        """
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        return socket.create_server((self.host, self.port), family=family, backlog=2048)


def http_server(settings: ServerSettings, address: Address) -> uvicorn.Server:
    """Open the export and the log, and return a server whose `run` answers until it is stopped:
    it then accepts no more connections, answers open requests, and finishes the log.

    Raises:
        MissingExtraError: the extra `serve` is not installed.
        ConfigError: other machines can reach the address and there is no token, or a certificate
            has no key.
        OfftowerError: there is no export, or the log cannot be written.
    """
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise MissingExtraError(error.name or "starlette", "serve", "serving") from error

    from offtower.server.app import Server

    token = Token(settings.token_file)
    if token.value is None and not address.is_loopback:
        raise ConfigError(
            f"other machines can reach {address.host}, so a token is needed: set {TOKEN_VARIABLE}, "
            "or name a file with --token-file; without a token the host must be 127.0.0.1"
        )
    if (address.certificate is None) != (address.key is None):
        raise ConfigError("TLS needs both a certificate and its key (--tls-cert, --tls-key)")
    for file in (address.certificate, address.key):
        if file is not None and not file.is_file():
            raise ConfigError(f"there is no file '{file}'")
    config = uvicorn.Config(
        Server(settings, token).application(),
        host=address.host,
        port=address.port,
        ssl_certfile=address.certificate,
        ssl_keyfile=address.key,
        limit_concurrency=address.connections,
        timeout_graceful_shutdown=address.grace_seconds,
        timeout_keep_alive=30,
        access_log=False,
        server_header=False,
        log_level="warning",
    )
    return uvicorn.Server(config)
