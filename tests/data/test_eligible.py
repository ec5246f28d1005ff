"""Eligible items of log rows, against sets that are worked out item by item."""

from __future__ import annotations

import pickle
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from offtower.data.catalogue import Catalogue
from offtower.data.check import BadRowsError, RowChecker
from offtower.data.eligible import EligibleItems, EligibleRows, eligible_items, reading_index
from offtower.data.eligible_groups import BitmapLimits
from offtower.data.encoding import FeatureEncoding
from offtower.data.ingest import IngestSource, ingest_files
from offtower.data.loading import concat_rows
from offtower.data.log import ParquetLog, TableLog, TableOrigin
from offtower.data.reader import scan
from offtower.data.rows import EncodedRows, encode_rows
from offtower.data.schema import CatalogueSchema, LogSchema
from offtower.data.validate import validate_log
from offtower.errors import ConfigError, DataError

N = 150
START = datetime(2026, 1, 1)
SECTION: dict[str, Any] = {
    "attribute": [
        {"item": "regions", "context": "region"},
        {"item": "kind", "context": "wanted_kind"},
    ],
    "interval": {"from": "listed_at", "until": "delisted_at"},
    "exclude": {"column": "seen"},
    "candidates": {"column": "shortlist"},
}
COLUMNS = ("regions", "kind", "listed_at", "delisted_at")
FORMS = ("attribute", "interval", "exclude", "candidates")
EMPTY = FeatureEncoding((), {}, {}, {})


def schema_of(*forms: str) -> LogSchema:
    chosen = {form: SECTION[form] for form in forms or FORMS}
    return LogSchema.from_dict({"timestamp": "time", "eligible": chosen})


def items_table(seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    regions = [
        None if rng.random() < 0.05 else rng.choice(["de", "fr", "it"], rng.integers(0, 4)).tolist()
        for _ in range(N)
    ]
    listed = [
        None if rng.random() < 0.2 else START + timedelta(days=int(rng.integers(0, 40)))
        for _ in range(N)
    ]
    until = [
        None if rng.random() < 0.2 else START + timedelta(days=int(rng.integers(0, 80)))
        for _ in range(N)
    ]
    return pa.table(
        {
            "item_id": [f"i{j}" for j in range(N)],
            "regions": pa.array(regions, pa.list_(pa.string())),
            "kind": pa.array(rng.integers(0, 3, N)),
            "listed_at": pa.array(listed, pa.timestamp("s")),
            "delisted_at": pa.array(until, pa.timestamp("ms")),
        }
    )


def catalogue_of(table: pa.Table | None = None) -> Catalogue:
    return Catalogue(items_table() if table is None else table, CatalogueSchema(eligible=COLUMNS))


def rows_table(n: int, seed: int = 1) -> pa.Table:
    rng = np.random.default_rng(seed)
    ids = [f"i{j}" for j in range(N)]
    return pa.table(
        {
            "action": rng.choice(ids, n),
            "reward": rng.random(n),
            "pscore": np.full(n, 0.5),
            "region": rng.choice(["de", "fr", "it"], n),
            "wanted_kind": pa.array(rng.integers(0, 3, n), pa.int32()),
            "time": pa.array(
                [START + timedelta(hours=int(h)) for h in rng.integers(0, 2400, n)],
                pa.timestamp("us"),
            ),
            "seen": pa.array([rng.choice([*ids, "gone"], 20).tolist() for _ in range(n)]),
            "shortlist": pa.array([rng.choice(ids, 60).tolist() for _ in range(n)]),
        }
    )


def truth(items: pa.Table, rows: pa.Table, forms: tuple[str, ...] = FORMS) -> np.ndarray:
    """(n, N) by the definition of each form."""
    found = np.ones((rows.num_rows, N), dtype=bool)
    for i, row in enumerate(rows.to_pylist()):
        for j, item in enumerate(items.to_pylist()):
            ok = True
            if "attribute" in forms:
                ok &= row["region"] in (item["regions"] or [])
                ok &= row["wanted_kind"] == item["kind"]
            if "interval" in forms:
                ok &= item["listed_at"] is None or item["listed_at"] <= row["time"]
                ok &= item["delisted_at"] is None or row["time"] < item["delisted_at"]
            if "exclude" in forms:
                ok &= item["item_id"] not in row["seen"]
            if "candidates" in forms:
                ok &= item["item_id"] in row["shortlist"]
            found[i, j] = ok
    return found


def sets_of(rows: EligibleRows) -> np.ndarray:
    """(n, N) by asking for each item."""
    return np.stack([rows.contains(np.full(len(rows), j)) for j in range(N)], axis=1)


def dense(rows: EligibleRows) -> np.ndarray:
    """(n, N) from what the operators get."""
    import torch

    eligible = rows.on()
    n = len(rows)
    row = torch.arange(n).repeat_interleave(N)
    return eligible.contains(row, torch.arange(N).repeat(n)).view(n, N).numpy()


@pytest.mark.parametrize(
    "forms",
    [
        ("attribute",),
        ("interval",),
        ("exclude",),
        ("candidates",),
        ("attribute", "interval"),
        FORMS,
    ],
)
def test_sets_are_those_of_the_definition(forms: tuple[str, ...]) -> None:
    items, rows = items_table(), rows_table(40)
    eligible = EligibleItems(catalogue_of(items), schema_of(*forms))
    encoded = eligible.encode(rows)
    wanted = truth(items, rows, forms)
    assert 0.01 < wanted.mean() < 0.98
    np.testing.assert_array_equal(sets_of(encoded), wanted)
    np.testing.assert_array_equal(encoded.count(), wanted.sum(axis=1))
    np.testing.assert_array_equal(dense(encoded), wanted)


@pytest.mark.parametrize("forms", [("attribute",), ("exclude",), ("attribute", "exclude"), FORMS])
def test_eligible_items_are_counted_by_cluster(forms: tuple[str, ...]) -> None:
    items, rows = items_table(), rows_table(40)
    encoded = EligibleItems(catalogue_of(items), schema_of(*forms)).encode(rows)
    label = np.random.default_rng(7).integers(0, 5, N)
    found = encoded.items.cluster_counts(encoded, label, 6)
    np.testing.assert_array_equal(found, truth(items, rows, forms) @ np.eye(6, dtype=int)[label])


def test_bitmaps_of_any_order_of_groups_are_the_same() -> None:
    # Neighboring segments are reached by flipping bits, forwards, backwards and from afar.
    items, rows = items_table(), rows_table(60)
    wanted = truth(items, rows, ("attribute", "interval"))
    eligible = EligibleItems(
        catalogue_of(items), schema_of("attribute", "interval"), BitmapLimits(cache_bytes=100)
    )
    encoded = eligible.encode(rows)
    rng = np.random.default_rng(5)
    for size in (1, 3, 20, 60):
        index = rng.permutation(60)[:size]
        np.testing.assert_array_equal(dense(encoded.take(index)), wanted[index])


def test_rows_are_taken_joined_and_pickled() -> None:
    encoded = EligibleItems(catalogue_of(), schema_of()).encode(rows_table(30))
    whole = sets_of(encoded)
    index = np.array([7, 3, 3, 29, 0])
    np.testing.assert_array_equal(sets_of(encoded.take(index)), whole[index])
    parts = [
        encoded.take(np.arange(0, 4)),
        encoded.take(np.arange(4, 4)),
        encoded.take(np.arange(4, 30)),
    ]
    np.testing.assert_array_equal(sets_of(EligibleRows.concat(parts)), whole)
    np.testing.assert_array_equal(sets_of(pickle.loads(pickle.dumps(encoded))), whole)
    assert encoded.nbytes > encoded.take(index).nbytes > 0


def test_encoded_rows_carry_their_sets() -> None:
    catalogue, schema, table = catalogue_of(), schema_of(), rows_table(30)
    encoded = encode_rows(table, schema, catalogue, EMPTY, 0)
    assert encoded.eligible is not None
    whole = sets_of(encoded.eligible)
    bare = encode_rows(table, LogSchema(), catalogue, EMPTY, 0)
    assert bare.eligible is None and encoded.nbytes > bare.nbytes + encoded.eligible.nbytes // 2
    index = np.array([5, 1, 8])
    taken = encoded.take(index).without_context()
    assert taken.eligible is not None
    np.testing.assert_array_equal(sets_of(taken.eligible), whole[index])
    halves = [encoded.take(np.arange(0, 9)), encoded.take(np.arange(9, 30))]
    for joined in (EncodedRows.concat(halves), concat_rows(halves)):
        assert joined.eligible is not None
        np.testing.assert_array_equal(sets_of(joined.eligible), whole)


def allowed_rows(n: int) -> pa.Table:
    """Rows whose logged item is eligible."""
    items, rows = items_table(), rows_table(4 * n)
    sets = truth(items, rows)
    some = np.flatnonzero(sets.any(axis=1))[:n]
    action = [f"i{np.flatnonzero(sets[i])[0]}" for i in some]
    rows = rows.take(pa.array(some))
    return rows.set_column(0, "action", pa.array(action))


def changed(table: pa.Table, row: int, **values: Any) -> pa.Table:
    content = table.to_pylist()
    content[row].update(values)
    return pa.Table.from_pylist(content, schema=table.schema)


def ineligible(table: pa.Table, form: str) -> pa.Table:
    """The table with row 3 changed so that only this form rules out its item."""
    row = table.to_pylist()[3]
    item = items_table().to_pylist()[int(row["action"][1:])]
    if form == "attribute":
        return changed(table, 3, wanted_kind=(item["kind"] + 1) % 3)
    if form == "interval":
        items = items_table().to_pylist()
        early = next(
            one
            for one in items
            if one["listed_at"] is not None and one["listed_at"] > START and one["regions"]
        )
        return changed(
            table,
            3,
            action=early["item_id"],
            region=early["regions"][0],
            wanted_kind=early["kind"],
            time=START,
            seen=[],
            shortlist=[early["item_id"]],
        )
    if form == "exclude":
        return changed(table, 3, seen=[row["action"]])
    return changed(
        table,
        3,
        shortlist=[i for i in row["shortlist"] if i != row["action"]] + ["i0"]
        if row["action"] != "i0"
        else ["i1"],
    )


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("attribute", "its 'kind' lacks the row's 'wanted_kind'"),
        ("interval", "not available at the row's time by 'listed_at' and 'delisted_at'"),
        ("exclude", "excluded by the row's 'seen'"),
        ("candidates", "not among the row's 'shortlist'"),
    ],
)
def test_an_ineligible_action_is_a_bad_row(form: str, said: str, tmp_path: Any) -> None:
    good = allowed_rows(8)
    table, catalogue, schema = ineligible(good, form), catalogue_of(), schema_of()
    origin = TableOrigin("log.parquet", 0, 0)
    RowChecker(schema, catalogue).check(good, origin, 0)
    with pytest.raises(BadRowsError) as refused:
        RowChecker(schema, catalogue).check(table, origin, 0)
    assert len(refused.value.rows) == 1 and refused.value.rows[0].row == 3
    action = table.column("action")[3].as_py()
    assert f"column 'action' is '{action}' ({said}), expected an eligible item" in str(
        refused.value
    )
    checker = RowChecker(schema, catalogue, quarantine=tmp_path / "quarantine")
    assert checker.check(table, origin, 0).num_rows == 7 and checker.bad_rows == 1


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"region": "xx"}, "column 'region' is 'xx' (a value of no item)"),
        ({"region": None}, "column 'region' is null"),
        ({"shortlist": None}, "column 'shortlist' is null"),
        ({"shortlist": []}, "column 'shortlist' is [] (empty)"),
        ({"shortlist": ["i1", "gone"]}, "column 'shortlist' is ['i1', 'gone'] (with an unknown"),
        ({"time": None}, "column 'time' is null, expected a time"),
    ],
)
def test_bad_values_of_the_forms_are_bad_rows(values: dict[str, Any], said: str) -> None:
    table = changed(allowed_rows(8), 5, **values)
    with pytest.raises(BadRowsError) as refused:
        RowChecker(schema_of(), catalogue_of()).check(table, TableOrigin("log", 0, 0), 0)
    assert [row.row for row in refused.value.rows] == [5]
    assert said in str(refused.value)


def test_a_null_exclusion_list_is_empty() -> None:
    items, table = items_table(), changed(rows_table(5), 2, seen=None)
    encoded = EligibleItems(catalogue_of(items), schema_of("exclude")).encode(table)
    assert encoded.count()[2] == N


def test_contexts_get_the_sets_of_their_log_rows() -> None:
    items, table = items_table(), allowed_rows(8)
    eligible = EligibleItems(catalogue_of(items), schema_of())
    contexts = table.drop_columns(["action", "reward", "pscore"])
    np.testing.assert_array_equal(sets_of(eligible.of_contexts(contexts)), truth(items, table))


def test_contexts_without_a_time_are_served_now() -> None:
    items = items_table()
    eligible = EligibleItems(catalogue_of(items), schema_of("interval"))
    at = START + timedelta(days=20, hours=3)
    contexts = pa.table({"x": [1.0, 2.0]})
    wanted = truth(items, pa.table({"time": [at, at]}), ("interval",))
    np.testing.assert_array_equal(sets_of(eligible.of_contexts(contexts, at=at)), wanted)


def test_contexts_without_eligible_items_are_refused() -> None:
    table = allowed_rows(8).drop_columns(["action"])
    eligible = EligibleItems(catalogue_of(), schema_of())
    with pytest.raises(DataError, match=r"row 6 of the contexts has no eligible item"):
        eligible.of_contexts(changed(table, 6, seen=table.column("shortlist")[6].as_py()))
    with pytest.raises(DataError, match=r"row 2 of the contexts: column 'region' is 'xx'"):
        eligible.of_contexts(changed(table, 2, region="xx"))
    with pytest.raises(DataError, match="the contexts has no column 'seen'"):
        eligible.of_contexts(table.drop_columns(["seen"]))


def test_columns_of_wrong_types_are_refused() -> None:
    items, schema = items_table(), schema_of()
    wrong = items.set_column(1, "regions", pa.array(np.ones(N)))
    with pytest.raises(DataError, match="column 'regions', which is double"):
        EligibleItems(catalogue_of(wrong), schema)
    # A text file whose column is not named as a bag: no row's region would equal '["de"]'.
    wrong = items.set_column(1, "regions", pa.array(["de"] * (N - 1) + ['["de", "fr"]']))
    with pytest.raises(DataError, match=r"'regions', which holds the text .*kind: bag"):
        EligibleItems(catalogue_of(wrong), schema)
    brackets = items.set_column(1, "regions", pa.array(["de"] * (N - 1) + ["[north]"]))
    EligibleItems(catalogue_of(brackets), schema)
    wrong = items.set_column(3, "listed_at", pa.array(np.ones(N)))
    with pytest.raises(DataError, match="'listed_at', which is double: expected timestamps"):
        EligibleItems(catalogue_of(wrong), schema)
    wrong = items.set_column(3, "listed_at", pa.array(np.arange(N)))
    with pytest.raises(DataError, match="columns of different kinds"):
        EligibleItems(catalogue_of(wrong), schema)
    eligible, rows = EligibleItems(catalogue_of(items), schema), rows_table(3)
    for name, values, said in (
        ("region", pa.array([1, 2, 3]), "column 'region' holds int64, expected text"),
        ("seen", pa.array([[1], [2], [3]]), "column 'seen' holds list.*expected lists of text"),
        ("shortlist", pa.array(["a", "b", "c"]), "column 'shortlist' holds string"),
        ("time", pa.array([1, 2, 3]), "column 'time' holds integers"),
        (
            "time",
            pa.array([0, 1, 2], pa.timestamp("us", "UTC")),
            "holds times with a time zone, but the catalogue's",
        ),
    ):
        with pytest.raises(DataError, match=said):
            eligible.encode(rows.set_column(rows.column_names.index(name), name, values))
    with pytest.raises(DataError, match="opened without"):
        EligibleItems(Catalogue(items, CatalogueSchema()), schema)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({}, "at least one of"),
        ({"interval": {"from": "a"}}, "name 'timestamp'"),
        ({"exclude": {"column": "action"}}, "the action's column"),
        ({"exclude": {"columns": "seen"}}, "did you mean 'column'"),
        ({"interval": {"form": "a"}}, "did you mean 'from'"),
        ({"candidate": {"column": "c"}}, "did you mean 'candidates'"),
        ({"exclude": {"column": "c"}, "candidates": {"column": "c"}}, "cannot hold both"),
    ],
)
def test_wrong_sections_are_refused(section: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        LogSchema.from_dict({"eligible": section})


def test_a_batch_of_too_many_groups_is_refused() -> None:
    eligible = EligibleItems(
        catalogue_of(), schema_of("attribute", "interval"), BitmapLimits(batch_bytes=10 * 24)
    )
    rows = eligible.encode(rows_table(40))
    with pytest.raises(DataError, match=r"make training\.batch_size"):
        rows.on()
    assert rows.take(np.arange(10)).on().bitmap is not None


def test_ingest_keeps_the_columns(tmp_path: Any) -> None:
    import pyarrow.parquet as pq

    log, items = allowed_rows(20), items_table()
    pq.write_table(log, tmp_path / "log.parquet")
    pq.write_table(items, tmp_path / "items.parquet")
    source = IngestSource(tmp_path / "log.parquet", schema_of(), tmp_path / "items.parquet")
    ingest_files(source, tmp_path / "out")
    opened = ParquetLog.open(tmp_path / "out" / "log")
    catalogue = Catalogue.open(tmp_path / "out" / "catalogue")
    assert catalogue.schema.eligible == COLUMNS and opened.schema == schema_of()
    rows = next(scan(opened, catalogue, EMPTY, 64))
    assert rows.eligible is not None
    np.testing.assert_array_equal(sets_of(rows.eligible), truth(items, log))
    with pytest.raises(DataError, match="give the items' file with --catalogue"):
        ingest_files(IngestSource(tmp_path / "log.parquet", schema_of()), tmp_path / "other")


def test_a_log_schema_adds_columns_to_a_catalogue_that_has_a_schema(tmp_path: Any) -> None:
    import pyarrow.parquet as pq

    pq.write_table(items_table(), tmp_path / "items.parquet")
    found = Catalogue.open(tmp_path, CatalogueSchema(), log_schema=schema_of())
    assert eligible_items(found, schema_of()) is eligible_items(found, schema_of())
    copy = pickle.loads(pickle.dumps(reading_index(found, schema_of())))
    encoded = encode_rows(allowed_rows(4), schema_of(), copy, EMPTY, 0)
    assert encoded.eligible is not None and encoded.eligible.count().min() > 0


def test_numbers_without_time_zones_serve_as_times() -> None:
    items = pa.table(
        {"item_id": np.arange(3), "first": pa.array([0, 10, None]), "end": pa.array([10, 20, 15])}
    )
    schema = LogSchema.from_dict(
        {"timestamp": "t", "eligible": {"interval": {"from": "first", "until": "end"}}}
    )
    catalogue = Catalogue(items, CatalogueSchema(eligible=("first", "end")))
    rows = EligibleItems(catalogue, schema).encode(pa.table({"t": [-5, 0, 9, 10, 14, 15, 20]}))
    found = np.stack([rows.contains(np.full(7, j)) for j in range(3)], axis=1).astype(int)
    assert found.tolist() == [
        [0, 0, 1],
        [1, 0, 1],
        [1, 0, 1],
        [0, 1, 1],
        [0, 1, 1],
        [0, 1, 0],
        [0, 0, 0],
    ]


def uniform_log(n: int, *forms: str) -> TableLog:
    """Rows that show their eligible items with equal probabilities."""
    items, rows = items_table(), rows_table(2 * n)
    sets = truth(items, rows, forms)
    kept = np.flatnonzero(sets.any(axis=1))[:n]
    rng = np.random.default_rng(3)
    action = [f"i{rng.choice(np.flatnonzero(sets[i]))}" for i in kept]
    table = rows.take(pa.array(kept)).set_column(0, "action", pa.array(action))
    return TableLog(
        table.set_column(2, "pscore", pa.array(1.0 / sets[kept].sum(axis=1))), schema_of(*forms)
    )


def test_validation_compares_inverse_propensities_with_the_eligible_items() -> None:
    log = uniform_log(80, "attribute", "exclude")
    found = {one.name: one for one in validate_log(log, catalogue_of()).findings}
    inverse = found["inverse pscore"]
    assert inverse.level == "info" and "eligible items a row" in inverse.message
    assert inverse.numbers["mean"] == pytest.approx(inverse.numbers["items"])
    assert inverse.numbers["items"] < N / 3
    halved = log.table.set_column(2, "pscore", pa.array(np.asarray(log.table.column("pscore")) / 2))
    wrong = validate_log(TableLog(halved, log.schema), catalogue_of())
    assert {one.name: one.level for one in wrong.findings}["inverse pscore"] == "error"


def test_validation_counts_excluded_ids_that_the_catalogue_lacks() -> None:
    log = uniform_log(60, "exclude")
    gone = sum(row.count("gone") for row in log.table.column("seen").to_pylist())
    assert gone > 0
    found = {one.name: one for one in validate_log(log, catalogue_of()).findings}
    assert found["excluded items"].numbers["unknown"] == gone
    assert found["excluded items"].level == "info"
    lost = pa.array([["x"]] * log.num_rows)
    table = log.table.set_column(log.table.column_names.index("seen"), "seen", lost)
    lost_log = TableLog(table, log.schema)
    found = {one.name: one for one in validate_log(lost_log, catalogue_of()).findings}
    assert found["excluded items"].level == "warning"
