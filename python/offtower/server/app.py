"""The server as an ASGI application: routes, token, limits, errors as JSON.

POST /search   the k best items of contexts
POST /sample   draws from the served policy with propensities; logged
POST /reload   serve the export that CURRENT names
GET  /health   200 where requests can be answered; needs no token
GET  /metrics  for Prometheus
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qs

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from offtower.errors import OfftowerError
from offtower.server.answers import as_arrow, as_json
from offtower.server.batching import Batcher, BatchSettings, Responder
from offtower.server.decisions import DecisionLog
from offtower.server.errors import RequestError, error_body, status_of
from offtower.server.exports import CurrentExport
from offtower.server.metrics import Metrics
from offtower.server.requests import ARROW, JSON, ContextRequest, RequestReader, Verb
from offtower.server.settings import ServerSettings, Token

logger = logging.getLogger("offtower.server")

_LARGE = 1 << 16
"""Bytes of a body that is parsed in a thread, so that others are not kept waiting."""
_TICK_SECONDS = 1.0
"""How often old files of the log are finished."""
Handler = Callable[[Request], Awaitable[Response]]


class Server:
    """What the routes share, from the opening of the export to the last file of the log.

    Args:
        settings: of the server.
        token: that requests must bear.

    Raises:
        OfftowerError: there is no export, or the log cannot be written.
    """

    def __init__(self, settings: ServerSettings, token: Token) -> None:
        self.settings, self.token = settings, token
        self.metrics = Metrics()
        self.current = CurrentExport(settings.run)
        self.metrics.serve(self.current.opened.retriever.version)
        self.log: DecisionLog | None = None
        if settings.decisions is not None:
            self.log = DecisionLog(settings.decisions, self.metrics.decision_files.inc)
        self._responder = Responder(settings.mode, self.log, self.metrics)
        self._batcher: Batcher | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def application(self) -> Starlette:
        """The ASGI application; its lifespan starts and closes the server."""

        @contextlib.asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            await self.start()
            try:
                yield
            finally:
                await self.close()

        routes = [
            Route("/search", self._measured("search", self.search), methods=["POST"]),
            Route("/sample", self._measured("sample", self.sample), methods=["POST"]),
            Route("/reload", self._measured("reload", self.reload), methods=["POST"]),
            Route("/health", self.health, methods=["GET"]),
            Route("/metrics", self.show_metrics, methods=["GET"]),
        ]
        app = Starlette(routes=routes, lifespan=lifespan)
        app.add_exception_handler(HTTPException, _http_error)
        app.add_exception_handler(Exception, _failure)
        app.add_middleware(_Authorized, token=self.token)
        return app

    async def start(self) -> None:
        """Start to answer."""
        settings = self.settings
        self._batcher = Batcher(
            self._responder.answer,
            BatchSettings(
                settings.batch_milliseconds / 1000.0,
                settings.batch_contexts,
                settings.limits.waiting,
                settings.limits.timeout_seconds,
            ),
            self.metrics,
        )
        self._tasks.append(asyncio.create_task(self._finish_files()))
        if settings.poll_seconds:
            self._tasks.append(asyncio.create_task(self._poll()))

    async def close(self) -> None:
        """Answer what waits, and finish all files of the log."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._batcher is not None:
            await self._batcher.close()
        if self.log is not None:
            with contextlib.suppress(Exception):
                # Logged; the files stay in the spool for the next server.
                await asyncio.to_thread(self.log.close)

    async def search(self, request: Request) -> Response:
        return await self._answer("search", request)

    async def sample(self, request: Request) -> Response:
        return await self._answer("sample", request)

    async def reload(self, _: Request) -> Response:
        changed = await asyncio.to_thread(self._reload, again=True)
        version = self.current.opened.retriever.version
        return _json({"version": version, "changed": changed})

    async def health(self, _: Request) -> Response:
        retriever = self.current.opened.retriever
        content = {
            "status": "ok",
            "version": retriever.version,
            "policy": retriever.policy_name,
            "items": retriever.num_items,
            "refused": self.current.refused,
            "decisions": None if self.log is None else {"unfinished_files": self.log.unfinished},
        }
        return _json(content)

    async def show_metrics(self, _: Request) -> Response:
        self.metrics.unfinished.set(0 if self.log is None else self.log.unfinished)
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _answer(self, verb: Verb, request: Request) -> Response:
        assert self._batcher is not None
        # Required: a web page can send requests without a type to this machine, but not with these.
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind not in (JSON, ARROW):
            raise RequestError(
                f"content type '{kind}' is not read; send {JSON} or {ARROW}", status=415
            )
        encoding = request.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise RequestError(f"content encoding '{encoding}' is not read", status=415)
        content = await self._body(request)
        opened = self.current.opened
        reader = RequestReader(
            opened.retriever, opened.columns, self.settings.limits, self.log is not None
        )
        query = parse_qs(request.url.query, keep_blank_values=True)

        def read() -> ContextRequest:
            if kind == ARROW:
                return reader.arrow(verb, content, query)
            return reader.json(verb, content, query)

        found = await asyncio.to_thread(read) if len(content) > _LARGE else read()
        self.metrics.late_events.inc(found.late_events)
        answer = await self._batcher.submit(opened, found)
        accepted = request.headers.get("accept", "")
        if ARROW in accepted or (kind == ARROW and JSON not in accepted):
            return Response(as_arrow(answer, opened.retriever), media_type=ARROW)
        return Response(as_json(answer), media_type=JSON)

    async def _body(self, request: Request) -> bytes:
        most = self.settings.limits.body_bytes
        too_large = RequestError(f"the body has more than {most:,} bytes", status=413)
        stated = request.headers.get("content-length", "0")
        if stated.isascii() and stated.isdigit() and int(stated) > most:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.settings.limits.timeout_seconds):
                async for part in request.stream():
                    size += len(part)
                    if size > most:
                        raise too_large
                    parts.append(part)
        except TimeoutError:
            raise RequestError("the body did not arrive in time", status=408) from None
        except ClientDisconnect:
            raise RequestError("the body is incomplete", status=400) from None
        return b"".join(parts)

    def _measured(self, route: str, handler: Handler) -> Handler:
        """The handler with errors as JSON, its answers counted and timed."""

        async def measured(request: Request) -> Response:
            begun = time.perf_counter()
            try:
                response = await handler(request)
            except OfftowerError as error:
                response = _error(error)
            except Exception as error:
                logger.exception("/%s failed", route)
                response = await _failure(request, error)
            self.metrics.seconds.labels(route).observe(time.perf_counter() - begun)
            self.metrics.requests.labels(route, str(response.status_code)).inc()
            return response

        return measured

    def _reload(self, *, again: bool = False) -> bool:
        try:
            self.token.refresh()
            changed = self.current.reload(again=again)
        except OfftowerError as error:
            self.metrics.reloads.labels("failed").inc()
            raise RequestError(
                f"the export before stays: {error}", status=HTTPStatus.CONFLICT
            ) from error
        if changed:
            self.metrics.reloads.labels("changed").inc()
            self.metrics.serve(self.current.opened.retriever.version)
        return changed

    async def _poll(self) -> None:
        before = ""
        while True:
            await asyncio.sleep(self.settings.poll_seconds)
            try:
                await asyncio.to_thread(self._reload)
                before = ""
            except OfftowerError as error:
                if str(error) != before:
                    logger.error("%s", error)
                before = str(error)

    async def _finish_files(self) -> None:
        while self.log is not None:
            await asyncio.sleep(_TICK_SECONDS)
            try:
                await asyncio.to_thread(self.log.finish)
            except Exception:
                self.metrics.decision_errors.inc()


class _Authorized:
    """Refuses requests without the token, except those for /health."""

    def __init__(self, app: ASGIApp, token: Token) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        wanted = self._token.value
        # A proxy may serve the application below a path.
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or wanted is None or path == "/health":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if hmac.compare_digest(given, f"Bearer {wanted}".encode()):
            await self._app(scope, receive, send)
            return
        error = RequestError("send the header 'Authorization: Bearer TOKEN'", status=401)
        response = _error(error)
        response.headers["www-authenticate"] = "Bearer"
        await response(scope, receive, send)


def _json(content: Any, status: int = 200) -> Response:
    return Response(json.dumps(content), status, media_type=JSON)


def _error(error: OfftowerError) -> Response:
    response = _json(error_body(error), status_of(error))
    if response.status_code == HTTPStatus.SERVICE_UNAVAILABLE:
        response.headers["retry-after"] = "1"
    return response


async def _http_error(_: Request, error: Exception) -> Response:
    """Errors of the router: an unknown path or method."""
    assert isinstance(error, HTTPException)
    known = "POST /search, /sample and /reload, GET /health and /metrics"
    found = RequestError(f"{error.detail}; there are {known}", status=error.status_code)
    response = _error(found)
    response.headers.update(error.headers or {})
    return response


async def _failure(_: Request, error: Exception) -> Response:
    found = RequestError(f"the server failed ({type(error).__name__}); see its log", status=500)
    return _error(found)
