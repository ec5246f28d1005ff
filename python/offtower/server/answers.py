"""Answers in JSON and as Arrow IPC streams."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

from offtower.retrieval import Retriever, SampleResult
from offtower.server.batching import Answer


def as_json(answer: Answer) -> bytes:
    """One object, with the contexts in the order of the request."""
    result = answer.result
    contexts: list[dict[str, Any]] = []
    for number, row in enumerate(answer.rows):
        items = result.item_id[row]
        one: dict[str, Any] = {"items": items}
        if isinstance(result, SampleResult):
            one["round_id"] = answer.round_ids[number]
            one["pscore"] = result.pscore[row, : len(items)].tolist()
            one["relative_error"] = result.relative_error[row, : len(items)].tolist()
        else:
            one["score"] = result.score[row].tolist()
        contexts.append(one)
    content = {"version": answer.version, "policy": answer.policy, "contexts": contexts}
    return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def as_arrow(answer: Answer, retriever: Retriever) -> bytes:
    """A row for each context, with lists; version and policy are metadata of the schema."""
    result, rows = answer.result, answer.rows
    ids = retriever.item_ids.type
    columns: dict[str, pa.Array] = {
        "items": pa.array([result.item_id[row] for row in rows], pa.list_(ids))
    }
    if isinstance(result, SampleResult):
        columns["round_id"] = pa.array(answer.round_ids, pa.string())
        for name in ("pscore", "relative_error"):
            values = getattr(result, name)
            lists = [values[row, : len(result.item_id[row])] for row in rows]
            columns[name] = pa.array(lists, pa.list_(pa.float64()))
    else:
        columns["score"] = pa.array([result.score[r] for r in rows], pa.list_(pa.float32()))
    table = pa.table(columns).replace_schema_metadata(
        {"version": answer.version, "policy": answer.policy}
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    content: bytes = sink.getvalue().to_pybytes()
    return content
