"""Requests that arrive together become one call of the retriever."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa

from offtower.errors import DataError, OfftowerError
from offtower.retrieval import Retriever, SampleResult, SearchResult, decisions_table
from offtower.retrieval.propensity_sampler import Mode
from offtower.server.decisions import DecisionLog
from offtower.server.errors import RequestError
from offtower.server.exports import OpenExport
from offtower.server.metrics import Metrics
from offtower.server.requests import ContextRequest

logger = logging.getLogger("offtower.server")


@dataclass(frozen=True, eq=False)
class Answer:
    """The part of a result that belongs to one request.

    Attributes:
        rows: of the request in the result.
        round_ids: of the contexts, for outcomes; none for a search.
    """

    result: SearchResult | SampleResult
    rows: range
    version: str
    policy: str
    round_ids: tuple[str, ...] = ()


@dataclass(eq=False)
class _Waiting:
    export: OpenExport
    request: ContextRequest
    deadline: float
    answer: asyncio.Future[Answer]

    @property
    def key(self) -> tuple[object, ...]:
        """Requests with equal keys can be answered by one call."""
        one = self.request
        return (id(self.export), one.verb, one.k, one.exact, one.exclude is None)


@dataclass
class Responder:
    """Answers requests of one kind together, in the thread that calls it.

    Attributes:
        log: of decisions; None logs none.
    """

    mode: Mode
    log: DecisionLog | None
    metrics: Metrics
    random: np.random.Generator = field(default_factory=np.random.default_rng)

    def answer(
        self, export: OpenExport, requests: Sequence[ContextRequest]
    ) -> list[Answer | Exception]:
        """Answer each request, or say why it cannot be; one that fails fails alone."""
        try:
            return list(self._together(export.retriever, requests))
        except OfftowerError as error:
            if len(requests) == 1:
                return [_named(error)]
            return [self.answer(export, [one])[0] for one in requests]
        except Exception as error:
            logger.exception("a call of the retriever failed")
            return [error] * len(requests)

    def _together(self, retriever: Retriever, requests: Sequence[ContextRequest]) -> list[Answer]:
        first = requests[0]
        contexts = pa.concat_tables([one.contexts for one in requests]).combine_chunks()
        exclude = None
        if first.exclude is not None:
            exclude = [ids for one in requests for ids in one.exclude or ()]
        now = datetime.now(UTC)
        result: SearchResult | SampleResult
        round_ids: tuple[str, ...] = ()
        with self.metrics.retriever_seconds.labels(first.verb).time():
            if first.verb == "search":
                result = retriever.search(
                    contexts, first.k, exclude=exclude, exact=first.exact, at=now, on_empty="skip"
                )
                lengths = [len(items) for items in result.item]
            else:
                result = retriever.sample(
                    contexts,
                    first.k,
                    mode=self.mode,
                    exclude=exclude,
                    seed=self.random,
                    at=now,
                    on_empty="skip",
                )
                lengths = result.lengths.tolist()
                call = f"{now:%Y%m%dT%H%M%S%f}-{uuid.uuid4().hex[:16]}"
                round_ids = tuple(f"{call}-{row}" for row in range(len(lengths)))
                self._log(retriever, contexts, result, round_ids, now)
        self.metrics.batch_contexts.labels(first.verb).observe(len(lengths))
        self.metrics.empty.inc(lengths.count(0))
        answers, start = [], 0
        for one in requests:
            rows = range(start, start + one.contexts.num_rows)
            ids = round_ids[rows.start : rows.stop]
            answers.append(Answer(result, rows, retriever.version, retriever.policy_name, ids))
            start = rows.stop
        return answers

    def _log(
        self,
        retriever: Retriever,
        contexts: pa.Table,
        served: SampleResult,
        round_ids: Sequence[str],
        now: datetime,
    ) -> None:
        if self.log is None:
            return
        decisions = decisions_table(
            retriever, contexts, served, round_id=pa.array(round_ids), served_at=now
        )
        try:
            self.log.append(retriever, served, decisions)
        except (OSError, pa.ArrowException) as error:
            logger.error("decisions cannot be logged: %s", error)
            self.metrics.decision_errors.inc(decisions.num_rows)
            raise RequestError(
                "the decision cannot be logged, so nothing is served", status=503
            ) from error
        self.metrics.decisions.inc(decisions.num_rows)


def _named(error: OfftowerError) -> OfftowerError:
    """The error with the field that it is about: all others are checked when a request is read."""
    return RequestError(str(error), field="contexts") if isinstance(error, DataError) else error


@dataclass(frozen=True)
class BatchSettings:
    """How long requests wait for others, how many contexts are answered together, and how many may
    wait for how long."""

    wait_seconds: float
    contexts: int
    waiting: int
    timeout_seconds: float


class Batcher:
    """Collects requests while the retriever works, and a little longer where it is idle.

    One thread calls the retriever, which has threads of its own. A request that waited longer
    than the timeout is refused before anything is drawn; from then on it is answered.

    Args:
        answer: answers requests of one kind, in the thread.
    """

    def __init__(
        self,
        answer: Callable[[OpenExport, Sequence[ContextRequest]], list[Answer | Exception]],
        settings: BatchSettings,
        metrics: Metrics,
    ) -> None:
        self._answer, self._settings, self._metrics = answer, settings, metrics
        self._waiting: deque[_Waiting] = deque()
        self._contexts = 0
        self._arrived, self._closing = asyncio.Event(), False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="offtower-retriever")
        self._task = asyncio.create_task(self._run())

    async def submit(self, export: OpenExport, request: ContextRequest) -> Answer:
        """Wait for the answer to a request.

        Raises:
            RequestError: too many wait, it waited for too long, or the server stops.
            OfftowerError: it cannot be answered.
        """
        count = request.contexts.num_rows
        if self._closing:
            raise RequestError("the server stops", status=503)
        if self._contexts + count > self._settings.waiting:
            raise RequestError("too many requests wait; try again later", status=503)
        deadline = time.monotonic() + self._settings.timeout_seconds
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(export, request, deadline, future))
        self._count(count)
        self._arrived.set()
        return await future

    async def close(self) -> None:
        """Answer all that wait, then stop."""
        self._closing = True
        self._arrived.set()
        await self._task
        self._thread.shutdown()

    def _count(self, change: int) -> None:
        self._contexts += change
        self._metrics.waiting.set(self._contexts)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        idle = True
        while True:
            if not self._waiting:
                if self._closing:
                    return
                idle = True
                self._arrived.clear()
                await self._arrived.wait()
            if idle and self._contexts < self._settings.contexts and self._settings.wait_seconds:
                await asyncio.sleep(self._settings.wait_seconds)
            idle = False
            batch = self._take()
            if not batch:
                continue
            requests = [one.request for one in batch]
            found = await loop.run_in_executor(
                self._thread, self._answer, batch[0].export, requests
            )
            for one, answer in zip(batch, found, strict=True):
                if one.answer.done():
                    continue
                if isinstance(answer, Exception):
                    one.answer.set_exception(answer)
                else:
                    one.answer.set_result(answer)

    def _take(self) -> list[_Waiting]:
        """Requests that can be answered with the one that waits longest, in their order."""
        batch: list[_Waiting] = []
        kept: deque[_Waiting] = deque()
        taken, now = 0, time.monotonic()
        while self._waiting:
            one = self._waiting.popleft()
            count = one.request.contexts.num_rows
            if one.answer.done() or now > one.deadline:
                if not one.answer.done():
                    message = f"no answer within {self._settings.timeout_seconds:g} s"
                    one.answer.set_exception(RequestError(message, status=504))
                self._count(-count)
            elif not batch or (
                one.key == batch[0].key and taken + count <= self._settings.contexts
            ):
                batch.append(one)
                taken += count
                self._count(-count)
            else:
                kept.append(one)
            if taken >= self._settings.contexts:
                break
        kept.extend(self._waiting)
        self._waiting = kept
        return batch
