"""Bodies of `/search` and `/sample`: JSON, or contexts as an Arrow IPC stream.

JSON:   {"contexts": [{"age": 31, "country": "fr"}], "k": 10, "exclude": [["a1", "b2"]]}
Arrow:  the stream of a table of contexts; k, exclude (repeated) and exact are in the query.

Bodies are untrusted: what they unpack to is bounded by their size before it is unpacked.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from offtower.data.formats.json_lines import objects_table
from offtower.data.histories import history_faults, without_late_events
from offtower.errors import DataError
from offtower.retrieval import Retriever
from offtower.server.columns import ContextColumns
from offtower.server.errors import RequestError
from offtower.server.settings import Limits

JSON = "application/json"
ARROW = "application/vnd.apache.arrow.stream"
Verb = Literal["search", "sample"]
Id = str | int


@checked_dataclass(config=ConfigDict(extra="forbid", strict=True), frozen=True)
class Body:
    """The fields of a request in JSON."""

    contexts: list[dict[str, Any]] | dict[str, Any]
    """One context, or a list of them."""
    k: int | None = Field(default=None, ge=1)
    """Items of each context; serving.k by default."""
    exclude: list[Id] | list[list[Id]] | None = None
    """Ids to leave out: for all contexts, or a list for each."""
    exact: bool = False
    """Of a search: score every item."""


_BODY: TypeAdapter[Body] = TypeAdapter(Body)


@dataclass(frozen=True)
class ContextRequest:
    """A request whose fields are valid.

    Attributes:
        contexts: (n,) rows with the columns of `ContextColumns`.
        exclude: ids that each context leaves out; None where the request names none.
        late_events: events of histories that were dropped (`without_late_events`).
    """

    verb: Verb
    contexts: pa.Table
    k: int
    exclude: tuple[list[Id], ...] | None = None
    exact: bool = False
    late_events: int = 0


@dataclass(frozen=True)
class RequestReader:
    """Reads the bodies of requests for one export.

    Attributes:
        decisions: whether what is sampled is logged.
    """

    retriever: Retriever
    columns: ContextColumns
    limits: Limits
    decisions: bool

    def json(
        self, verb: Verb, content: bytes, query: Mapping[str, Sequence[str]]
    ) -> ContextRequest:
        """Read a body in JSON; the query is empty.

        Raises:
            RequestError: names the field.
        """
        for name in query:
            raise RequestError("belongs into the body", field=name)
        body = _parsed(content)
        objects = [body.contexts] if isinstance(body.contexts, dict) else body.contexts
        self._check_count(len(objects))
        self.columns.check_names(
            {name for one in objects for name in one}, decisions=self._logs(verb)
        )
        try:
            given = objects_table(objects, self.columns.conversion.kinds)
        except (DataError, pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise RequestError(str(error), field="contexts") from None
        batch = given.combine_chunks().to_batches()[0]
        return self._request(verb, batch, body)

    def arrow(
        self, verb: Verb, content: bytes, query: Mapping[str, Sequence[str]]
    ) -> ContextRequest:
        """Read an Arrow IPC stream; the other fields are in the query.

        Raises:
            RequestError: names the field.
        """
        body = _of_query(query, text_ids=bool(self.retriever.manifest["vectors"]["text_ids"]))
        batch = _batch(content, self.limits.contexts)
        self._check_count(batch.num_rows)
        names = batch.schema.names
        for name in names:
            if names.count(name) > 1:
                raise RequestError(f"column '{name}' stands twice", field=f"contexts.{name}")
        self.columns.check_names(names, decisions=self._logs(verb))
        return self._request(verb, batch, body)

    def _logs(self, verb: Verb) -> bool:
        return self.decisions and verb == "sample"

    def _check_count(self, count: int) -> None:
        if not 1 <= count <= self.limits.contexts:
            raise RequestError(
                f"a request has from 1 to {self.limits.contexts:,} contexts, got {count:,}",
                field="contexts",
            )

    def _request(self, verb: Verb, batch: pa.RecordBatch, body: Body) -> ContextRequest:
        try:
            contexts = self.columns.table(batch)
        except (pa.ArrowException, ValueError, OverflowError) as error:
            if isinstance(error, RequestError):
                raise
            raise RequestError(f"the contexts cannot be read: {error}", field="contexts") from error
        if self._logs(verb) and self.columns.user_id is not None:
            _refuse_null(contexts, self.columns.user_id, "the log of decisions")
        contexts, late = self._histories(contexts)
        k = self.retriever.serving.k if body.k is None else body.k
        most = min(self.limits.k, self.retriever.num_items)
        if k > most:
            raise RequestError(f"k must lie in [1, {most:,}], got {k}", field="k")
        top = self.retriever.serving.top
        if verb == "sample" and top is not None and top < k and not self.retriever.serving.uniform:
            raise RequestError(f"serving.top leaves {top:,} items, got {k}", field="k")
        if body.exact and verb == "sample":
            raise RequestError(
                "exact is for /search; the server's mode says how it draws", field="exact"
            )
        excluded = self._excluded(body, len(batch))
        return ContextRequest(verb, contexts, k, excluded, body.exact, late)

    def _histories(self, contexts: pa.Table) -> tuple[pa.Table, int]:
        """The contexts without events that are later than the request, and their number."""
        time, late = self.retriever.tower.encoding.timestamp, 0
        if time is not None:
            _refuse_null(contexts, time, "a history with times")
        histories = [spec for spec in self.columns.features if spec.history]
        try:
            contexts, late = without_late_events(contexts, histories, time)
            for spec in histories:
                for column, problem, expected, mask in history_faults(contexts, spec, time):
                    field = f"contexts[{int(np.argmax(mask))}].{column}"
                    raise RequestError(f"{problem}, expected {expected}", field=field)
        except DataError as error:
            raise RequestError(str(error), field="contexts") from error
        return contexts, late

    def _excluded(self, body: Body, n: int) -> tuple[list[Id], ...] | None:
        if not body.exclude:
            return None
        lists: list[list[Id]]
        if isinstance(body.exclude[0], list):
            lists = body.exclude
            if len(lists) != n:
                raise RequestError(f"{len(lists)} lists for {n} contexts", field="exclude")
        else:
            lists = [body.exclude] * n
        try:
            for ids in lists[:1] if lists[0] is lists[-1] else lists:
                self.retriever.numbers_of(ids)
        except DataError as error:
            raise RequestError(str(error), field="exclude") from None
        return tuple(lists) if any(lists) else None


def _refuse_null(contexts: pa.Table, name: str, needed_by: str) -> None:
    column = contexts.column(name)
    if column.null_count:
        row = column.is_null().to_pylist().index(True)
        raise RequestError(
            f"'{name}' is null, and {needed_by} needs it", field=f"contexts[{row}].{name}"
        )


def _parsed(content: bytes) -> Body:
    try:
        return _BODY.validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            raise RequestError(f"the body is no JSON: {first['msg']}", status=400) from None
        # Branches of a union are named too, and are no part of the body.
        name, *inside = first["loc"] or ("",)
        where = "".join(f"[{part}]" for part in inside if isinstance(part, int))
        raise RequestError(first["msg"], field=f"{name}{where}" or None) from None


def _of_query(query: Mapping[str, Sequence[str]], *, text_ids: bool) -> Body:
    for name, values in query.items():
        if name not in ("k", "exclude", "exact"):
            raise RequestError("unknown; a query has k, exclude and exact", field=name)
        if name != "exclude" and len(values) > 1:
            raise RequestError("stands twice", field=name)
    k = query.get("k", [None])[0]
    if k is not None and not (k.isascii() and k.isdigit() and 0 < len(k) < 10 and int(k) > 0):
        raise RequestError("must be a positive whole number", field="k")
    exact = query.get("exact", ["false"])[0]
    if exact not in ("true", "false"):
        raise RequestError("must be true or false", field="exact")
    ids: list[Id] = list(query.get("exclude", []))
    if not text_ids:
        try:
            ids = [int(one) for one in ids]
        except ValueError:
            raise RequestError("ids of this export are integers", field="exclude") from None
    return Body(contexts=[], k=None if k is None else int(k), exclude=ids, exact=exact == "true")


def _batch(content: bytes, most: int) -> pa.RecordBatch:
    """The rows of an IPC stream, of which no part is compressed or a dictionary."""
    where = "contexts"
    try:
        messages = pa.ipc.MessageReader.open_stream(pa.py_buffer(content))
        for message in messages:
            if message.type not in ("schema", "record batch"):
                raise RequestError(
                    f"the stream has a {message.type}; send columns without dictionaries",
                    field=where,
                )
            if message.type == "record batch" and _is_compressed(message.metadata.to_pybytes()):
                raise RequestError("the stream is compressed; send it as it is", field=where)
        batches: list[pa.RecordBatch] = []
        rows = 0
        with pa.ipc.open_stream(content) as stream:
            schema = stream.schema
            for batch in stream:
                rows += batch.num_rows
                if rows > most:
                    break
                batch.validate(full=True)
                batches.append(batch)
        if rows > most:
            raise RequestError(f"a request has at most {most:,} contexts", field=where)
        table = pa.Table.from_batches(batches, schema).combine_chunks()
        found = table.to_batches()
        empty = pa.RecordBatch.from_arrays([pa.nulls(0, t) for t in schema.types], schema=schema)
        return found[0] if found else empty
    except (pa.ArrowException, OSError, ValueError, struct.error) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(
            f"the body is no Arrow IPC stream: {error}", status=400, field=where
        ) from None


def _is_compressed(metadata: bytes) -> bool:
    """Whether the FlatBuffer `Message` of a record batch names a compression.

    Source: Message.fbs of the Arrow format; `header` is the third field of Message, `compression`
    the fourth of RecordBatch. A table begins with the distance to its vtable, which has two bytes
    for its own size, two for the table's, and two for the offset of each field, 0 where it is not
    set. pyarrow verified the buffer.
    """

    def field(table: int, number: int) -> int:
        vtable = table - struct.unpack_from("<i", metadata, table)[0]
        at = 4 + 2 * number
        if at >= struct.unpack_from("<H", metadata, vtable)[0]:
            return 0
        offset = struct.unpack_from("<H", metadata, vtable + at)[0]
        return table + int(offset) if offset else 0

    message = struct.unpack_from("<I", metadata, 0)[0]
    header = field(message, 2)
    batch = header + struct.unpack_from("<I", metadata, header)[0]
    return field(batch, 3) != 0
