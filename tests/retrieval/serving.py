"""A server in a thread, and a client of it."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from offtower.server import ServerSettings
from offtower.server.process import Address, http_server
from offtower.server.requests import ARROW, JSON


class Client:
    """Requests to a server of this machine, one connection for each."""

    def __init__(self, port: int) -> None:
        self.port = port

    def send(
        self, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            known = {} if body is None else {"Content-Type": JSON}
            method = "GET" if body is None else "POST"
            connection.request(method, path, body, {**known, **(headers or {})})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def json(self, path: str, content: Any) -> tuple[int, Any]:
        status, body = self.send(path, json.dumps(content).encode(), {"Content-Type": JSON})
        return status, json.loads(body)

    def arrow(self, path: str, contexts: pa.Table) -> tuple[int, pa.Table]:
        status, body = self.send(path, ipc(contexts), {"Content-Type": ARROW, "Accept": "*/*"})
        assert status == 200, body
        return status, pa.ipc.open_stream(body).read_all()


def ipc(table: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    content: bytes = sink.getvalue().to_pybytes()
    return content


@contextmanager
def serving(configured: ServerSettings, address: Address = Address(port=0)) -> Iterator[Client]:
    """A server in a thread; it is stopped as SIGTERM stops it."""
    server = http_server(configured, address)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            thread.join(0.01)
        yield Client(server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = True
        thread.join()
