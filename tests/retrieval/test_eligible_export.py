"""Eligible items from a run through its export to the log of what was served."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from offtower.data.catalogue import Catalogue
from offtower.data.eligible import EligibleItems
from offtower.data.log import write_log
from offtower.errors import ConfigError, DataError, RunError
from offtower.retrieval import ExportOptions, Retriever, decisions_table, export_run, served_schema
from offtower.retrieval.contexts import read_contexts
from offtower.retrieval.eligible import FILE
from offtower.retrieval.retriever import SampleResult
from tests.training.eligible_data import N, exported_run, items, log, schemas

FORMS = ("attribute", "interval", "exclude", "candidates")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported_run(tmp_path_factory.mktemp("eligible"), FORMS, None)


def test_an_export_gives_contexts_the_sets_of_the_log(run: Path) -> None:
    table, sets = log(300, FORMS)
    eligible = Retriever.open(run).eligible
    assert isinstance(eligible, EligibleItems)
    rows = eligible.of_contexts(table.drop_columns(["action", "reward", "pscore"]))
    for item in range(N):
        np.testing.assert_array_equal(rows.contains(np.full(len(rows), item)), sets[:, item])


def test_contexts_without_the_section_are_refused(run: Path, tmp_path: Path) -> None:
    plain = replace(schemas(*FORMS)[0], eligible=None)
    write_log(tmp_path / "plain", [log(300, FORMS)[0].select(list(plain.columns))], plain)
    with pytest.raises(ConfigError, match="the export would serve every item"):
        export_run(run, ExportOptions(index=None, onnx=False), contexts=tmp_path / "plain")


def test_the_log_of_what_was_served_keeps_the_columns(run: Path) -> None:
    retriever = Retriever.open(run)
    table, sets = log(300, FORMS)
    contexts = table.take(pa.array([4, 9, 20]))
    shown = np.array([[np.flatnonzero(sets[i])[0]] for i in (4, 9, 20)])
    ones = np.ones((3, 1))
    served = SampleResult(
        item_id=[], item=shown, pscore=ones, relative_error=ones, conditional_pscore=ones,
        slate=False, version="1", mode="exact", policy="one",
    )  # fmt: skip
    found = decisions_table(retriever, contexts, served, served_at=datetime.now(UTC))
    for name in ("region", "seen", "shortlist", "time"):
        assert found.column(name).to_pylist() == contexts.column(name).to_pylist()
    # So the log's own sets are those that the items were chosen from.
    catalogue = Catalogue(items(), schemas(*FORMS)[1])
    rows = EligibleItems(catalogue, served_schema(retriever)).encode(found)
    np.testing.assert_array_equal(rows.count(), sets[[4, 9, 20]].sum(axis=1))


def test_a_lost_file_is_reported(run: Path, tmp_path: Path) -> None:
    retriever = Retriever.open(run)
    file = retriever.directory / FILE
    content = pq.read_table(file)
    try:
        pq.write_table(content.slice(1), file)
        with pytest.raises(RunError, match=r"has 69 rows for 70 items; export again"):
            Retriever(retriever.directory, retriever.manifest)
        file.unlink()
        with pytest.raises(RunError, match="cannot be read"):
            Retriever(retriever.directory, retriever.manifest)
    finally:
        pq.write_table(content, file)


def test_contexts_in_files_have_the_sets_of_the_log(run: Path, tmp_path: Path) -> None:
    table, sets = log(300, FORMS)
    retriever = Retriever.open(run)
    assert retriever.eligible is not None
    contexts = table.drop_columns(["action", "reward", "pscore"]).slice(0, 40)
    text = json.dumps(contexts.to_pylist())
    columns = {
        name: [json.dumps(cell) if isinstance(cell, list) else cell for cell in column]
        for name, column in contexts.to_pydict().items()
    }
    pa_csv.write_csv(pa.table(columns), tmp_path / "contexts.csv")
    for source in (text, str(tmp_path / "contexts.csv")):
        read = pa.concat_tables(read_contexts(source, retriever, rows=16))
        rows = retriever.eligible.of_contexts(read)
        for item in range(N):
            found = rows.contains(np.full(len(rows), item))
            np.testing.assert_array_equal(found, sets[:40, item])
    wrong = contexts.to_pylist()
    wrong[3]["seen"] = ["no item", 1.5]
    with pytest.raises(
        DataError, match=r"'seen' is .* in row 3, expected a list of text and whole"
    ):
        next(read_contexts(json.dumps(wrong), retriever, rows=16))


def test_requests_to_the_server_have_the_sets_of_files(run: Path) -> None:
    from offtower.server.columns import ContextColumns
    from offtower.server.errors import RequestError
    from offtower.server.requests import RequestReader
    from offtower.server.settings import Limits

    retriever, now = Retriever.open(run), datetime.now(UTC)
    assert retriever.eligible is not None
    table = log(300, FORMS)[0].slice(0, 40)
    contexts = table.drop_columns(["action", "reward", "pscore"])
    expected = retriever.eligible.of_contexts(contexts, at=now, allow_empty=True)
    reader = RequestReader(retriever, ContextColumns.of(retriever), Limits(), True)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, contexts.schema) as writer:
        writer.write_table(contexts)
    body = json.dumps({"contexts": contexts.to_pylist(), "k": 1}).encode()
    for request in (
        reader.json("search", body, {}),
        reader.arrow("search", sink.getvalue().to_pybytes(), {"k": ["1"]}),
    ):
        rows = retriever.eligible.of_contexts(request.contexts, at=now, allow_empty=True)
        for item in range(N):
            numbers = np.full(len(rows), item)
            np.testing.assert_array_equal(rows.contains(numbers), expected.contains(numbers))
    # Times of the catalogue are integers, so that the server's clock cannot stand in for them.
    for name in ("region", "time"):
        one = {key: value for key, value in contexts.to_pylist()[0].items() if key != name}
        with pytest.raises(RequestError, match=f"lack '{name}'"):
            reader.json("search", json.dumps({"contexts": one}).encode(), {})
