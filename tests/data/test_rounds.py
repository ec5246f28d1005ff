"""Rounds of slates from files to batches: checked, kept whole, ordered."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from offtower.data import Catalogue, CatalogueSchema, FeatureSpec, LogSchema
from offtower.data.check import BadRowsError, check_table
from offtower.data.eligible_schema import EligibleSchema, ListForm
from offtower.data.encoding import FeatureEncoding
from offtower.data.ingest import IngestSource, Split, ingest_files
from offtower.data.loading import Loader
from offtower.data.log import ParquetLog, TableLog, TableOrigin, write_log
from offtower.data.order import EpochOrder
from offtower.data.parts import RowSource, write_log_parts
from offtower.data.reader import BatchReader, scan
from offtower.errors import ConfigError
from offtower.execution import LOCAL

SCHEMA = LogSchema(
    context=(FeatureSpec(name="age", kind="numeric"), FeatureSpec(name="tags", kind="bag")),
    position="position",
    round_id="round",
    timestamp="time",
    pscore_kind="conditional",
)
CATALOGUE = Catalogue(pa.table({"item_id": np.arange(20)}), CatalogueSchema())


def slates(rounds: int, seed: int = 0, longest: int = 4) -> pa.Table:
    """Rounds of 1 to `longest` positions, in order of time; an item is shown once in each."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, rounds)
    number = np.repeat(np.arange(rounds), lengths)
    tags = [[f"t{j}" for j in range(i % 3)] for i in number]
    return pa.table(
        {
            "age": rng.normal(size=rounds)[number],
            "tags": pa.array(tags, pa.list_(pa.string())),
            "action": np.concatenate([rng.permutation(20)[:k] for k in lengths]),
            "reward": rng.integers(0, 2, number.size).astype(float),
            "pscore": rng.uniform(0.1, 1.0, number.size),
            "time": number * 10,
            "round": [f"r{i}" for i in number],
            "position": np.concatenate([np.arange(k) for k in lengths]),
        }
    )


def with_value(table: pa.Table, name: str, row: int, value: object) -> pa.Table:
    values = table.column(name).to_pylist()
    values[row] = value
    at = table.column_names.index(name)
    return table.set_column(at, name, pa.array(values, table.schema.field(name).type))


def faults(table: pa.Table, schema: LogSchema = SCHEMA) -> list[tuple[int, str, str]]:
    found = check_table(table, schema, CATALOGUE, TableOrigin("f"), 0)
    return [(bad.row, bad.column, bad.problem) for bad in found]


def three_rounds() -> pa.Table:
    """Rounds of 3, 2 and 3 rows."""
    table = slates(40, seed=3)
    lengths = np.bincount([int(r[1:]) for r in table.column("round").to_pylist()])
    ends = np.cumsum(lengths)
    wanted = [np.flatnonzero(lengths == 3)[0], np.flatnonzero(lengths == 2)[0]]
    wanted.append(np.flatnonzero(lengths == 3)[1])
    return pa.concat_tables([table.slice(ends[i] - lengths[i], lengths[i]) for i in wanted])


def test_good_rounds_have_no_fault_in_any_order_of_positions() -> None:
    table = three_rounds()
    assert faults(table) == []
    assert faults(table.take([2, 0, 1, 4, 3, 5, 6, 7])) == []


@pytest.mark.parametrize(
    ("name", "row", "value", "expected"),
    [
        ("position", 2, 3, [(2, "position", "no position of a whole round")]),
        ("position", 1, 0, [(1, "position", "no position of a whole round")]),
        ("round", 4, "other", [(4, "position", "no position of a whole round")]),
        ("age", 6, 9.0, [(6, "age", "another than in its round's first row")]),
        ("tags", 6, ["x", "y"], [(6, "tags", "another than in its round's first row")]),
    ],
)
def test_a_bad_round_is_an_exact_error(name, row, value, expected) -> None:
    assert faults(with_value(three_rounds(), name, row, value)) == expected


def test_an_item_shown_twice_in_a_round_is_refused() -> None:
    table = three_rounds()
    first = table.column("action")[0].as_py()
    assert faults(with_value(table, "action", 2, first)) == [
        (2, "action", "shown twice in its round")
    ]


def test_scattered_rounds_are_refused() -> None:
    table = three_rounds()
    assert {row for row, _, _ in faults(table.take([0, 1, 3, 4, 2, 5, 6, 7]))} == {4}


def test_slate_pscores_are_equal_in_a_round() -> None:
    schema = replace(SCHEMA, pscore_kind="slate")
    table = three_rounds()
    at = table.column_names.index("pscore")
    same = table.set_column(at, "pscore", pa.array([0.5] * 3 + [0.25] * 2 + [0.1] * 3))
    assert faults(same, schema) == []
    assert faults(with_value(same, "pscore", 4, 0.3), schema) == [
        (4, "pscore", "another than in its round's first row")
    ]


def test_positions_need_the_kind_of_their_pscores() -> None:
    with pytest.raises(ValueError, match=r"marginal.*conditional.*slate"):
        LogSchema(position="position")
    with pytest.raises(ConfigError, match=r"marginal.*conditional.*slate"):
        LogSchema.from_dict({"position": "position"})
    with pytest.raises(ConfigError, match="round_id"):
        LogSchema.from_dict({"position": "position", "pscore_kind": "conditional"})
    with pytest.raises(ConfigError, match="position and round_id"):
        LogSchema.from_dict({"round_id": "round", "pscore_kind": "slate"})
    assert LogSchema(position="position", pscore=None).pscore_kind is None
    assert LogSchema.from_dict(SCHEMA.to_dict()) == SCHEMA


def test_a_round_with_a_bad_row_is_quarantined_as_a_whole(tmp_path: Path) -> None:
    table = with_value(three_rounds(), "reward", 4, float("nan"))
    pq.write_table(table, tmp_path / "log.parquet")
    source = IngestSource(tmp_path / "log.parquet", SCHEMA)
    with pytest.raises(BadRowsError, match="row 4 of the log: column 'reward' is nan"):
        ingest_files(source, tmp_path / "refused")
    done = ingest_files(source, tmp_path / "out", on_bad_rows="quarantine")
    assert (done.rows, done.quarantined) == (6, 2)
    aside = pq.read_table(str(next(Path(str(tmp_path / "out" / "quarantine")).iterdir())))
    assert aside.column("_row").to_pylist() == [3, 4]
    assert aside.column("_reason")[0].as_py() == "another row of its round is bad"


ELIGIBLE = replace(SCHEMA, eligible=EligibleSchema(candidates=ListForm("shortlist")))
LEFT = {0: [3, 4, 5, 6, 7], 3: [0, 1, 2, 5, 6, 7], 5: [0, 1, 2, 3, 4]}
"""Rows of `three_rounds` that are left without the round that begins with a row."""


@pytest.mark.parametrize(
    ("name", "row", "value", "bad"),
    [
        ("position", 2, 3, 0),
        ("position", 1, 0, 0),
        ("position", 5, None, 5),
        ("round", 4, "other", 3),
        ("round", 4, None, 3),
        ("round", 1, "other", 0),
        ("action", 1, 999, 0),
        ("action", 7, "first", 5),
        ("age", 6, 9.0, 5),
        ("tags", 6, ["x", "y"], 5),
        ("pscore", 2, 1.5, 0),
        ("pscore", 4, 0.0, 3),
        ("shortlist", 6, [0, 1], 5),
        ("shortlist", 3, [], 3),
    ],
)
def test_a_fault_sets_its_whole_round_aside(name, row, value, bad, tmp_path: Path) -> None:
    """Never a part of it: a round that lost rows would count as a shorter one."""
    table = three_rounds()
    first = table.column("action")[5].as_py()
    every = pa.array([list(range(20))] * len(table), pa.list_(pa.int64()))
    table = table.append_column("shortlist", every)
    table = with_value(table, name, row, first if value == "first" else value)
    pq.write_table(table, tmp_path / "log.parquet")
    pq.write_table(pa.table({"item_id": np.arange(20)}), tmp_path / "items.parquet")
    items = tmp_path / "items.parquet"
    source = IngestSource(tmp_path / "log.parquet", ELIGIBLE, items, CatalogueSchema())
    with pytest.raises(BadRowsError, match=rf"row {row}|row {bad} "):
        ingest_files(source, tmp_path / "refused")
    done = ingest_files(source, tmp_path / "out", on_bad_rows="quarantine")
    found = pa.concat_tables(ParquetLog.open(done.log).tables())
    left = table.take(pa.array(LEFT[bad]))
    assert found.column("action").to_pylist() == left.column("action").to_pylist()
    assert found.column("position").to_pylist() == left.column("position").to_pylist()


def test_a_log_whose_actions_are_not_eligible_is_refused(tmp_path: Path) -> None:
    table = three_rounds()
    shown = table.column("action").to_pylist()
    lists = [[item for item in range(20) if item != shown[4] or row != 4] for row in range(8)]
    lists[3] = lists[4]
    table = table.append_column("shortlist", pa.array(lists, pa.list_(pa.int64())))
    found = check_table(table, ELIGIBLE, CATALOGUE, TableOrigin("f"), 0)
    assert [(bad.row, bad.column, bad.value) for bad in found] == [(4, "action", str(shown[4]))]
    assert found[0].problem == "not among the row's 'shortlist'"
    pq.write_table(table, tmp_path / "log.parquet")
    pq.write_table(pa.table({"item_id": np.arange(20)}), tmp_path / "items.parquet")
    source = IngestSource(
        tmp_path / "log.parquet", ELIGIBLE, tmp_path / "items.parquet", CatalogueSchema()
    )
    done = ingest_files(source, tmp_path / "out", on_bad_rows="quarantine")
    assert (done.rows, done.quarantined) == (6, 2)


def test_parts_of_a_round_that_lie_apart_are_set_aside_together(tmp_path: Path) -> None:
    table = three_rounds().take([0, 1, 3, 4, 2, 5, 6, 7])
    pq.write_table(table, tmp_path / "log.parquet")
    source = IngestSource(tmp_path / "log.parquet", SCHEMA)
    done = ingest_files(source, tmp_path / "out", on_bad_rows="quarantine")
    left = pa.concat_tables(ParquetLog.open(done.log).tables()).column("round").to_pylist()
    names = table.column("round").to_pylist()
    # The round of rows 3 and 4 lies before the stray row, whose position goes on with it.
    assert set(left) == {names[5]} and (done.rows, done.quarantined) == (3, 5)


def rounds_of(table: pa.Table) -> list[str]:
    """Round of each run of rows; each run must be a whole round by position."""
    names, positions = table.column("round").to_pylist(), table.column("position").to_numpy()
    starts = np.flatnonzero(positions == 0)
    for start, stop in zip(starts, [*starts[1:], len(names)], strict=True):
        assert len(set(names[start:stop])) == 1
        assert positions[start:stop].tolist() == list(range(stop - start))
    assert not len(names) or positions[0] == 0
    return [names[start] for start in starts]


def test_ingest_and_every_split_keep_rounds_whole(tmp_path: Path) -> None:
    table = slates(3000)
    shuffled = table.take(np.lexsort((-table.column("position").to_numpy(), table["time"])))
    pq.write_table(shuffled, tmp_path / "log.parquet", row_group_size=500)
    source = IngestSource(tmp_path / "log.parquet", SCHEMA)
    for by in ("time", "round", "row"):
        ingest_files(source, tmp_path / by, split=Split(by, (0.6, 0.4)))
        parts = [ParquetLog.open(tmp_path / by / name) for name in ("train", "validation")]
        found = [rounds_of(pa.concat_tables(part.tables())) for part in parts]
        assert sorted(found[0] + found[1]) == sorted(set(table.column("round").to_pylist()))
        for part in parts:
            for group in part.tables():
                rounds_of(group)


class Whole(RowSource):
    """A table in units of 7 rounds."""

    def __init__(self, table: pa.Table) -> None:
        starts = np.flatnonzero(table.column("position").to_numpy() == 0)[::7]
        self.edges = [*starts.tolist(), table.num_rows]
        self.table, self.counts = table, np.diff(self.edges).astype(np.int64)

    def tables(self, unit):
        yield self.table.slice(self.edges[unit], int(self.counts[unit]))


@pytest.mark.parametrize("rows_per_file", [16, 40])
def test_files_written_in_parts_equal_those_of_one_pass(tmp_path: Path, rows_per_file) -> None:
    table = slates(100, seed=5)
    write_log(tmp_path / "one", [table], SCHEMA, 8, rows_per_file)
    sizes = {"rows_per_group": 8, "rows_per_file": rows_per_file}
    write_log_parts(tmp_path / "parts", Whole(table), SCHEMA, LOCAL, **sizes)
    logs = [ParquetLog.open(tmp_path / name) for name in ("one", "parts")]
    assert logs[0].fingerprint == logs[1].fingerprint
    assert logs[0].row_group_sizes.tolist() == logs[1].row_group_sizes.tolist()
    assert rounds_of(pa.concat_tables(logs[1].tables())) == [f"r{i}" for i in range(100)]
    for group in logs[1].tables():
        rounds_of(group)


def encoding(log) -> FeatureEncoding:
    return FeatureEncoding.fit(SCHEMA.context, log.tables())


def test_batches_hold_whole_rounds_for_any_number_of_workers() -> None:
    log = TableLog(slates(400), SCHEMA, rows_per_group=64)
    order = EpochOrder(log.row_group_sizes, 50, seed=1, window_rows=300, num_folds=3)
    with BatchReader(Loader(log, CATALOGUE, encoding(log)), order) as reader:
        alone = [step.rows for step in reader.epoch(0)]
        shares = [[step.rows for step in reader.epoch(0, rank=r, world_size=3)] for r in range(3)]
    seen: list[int] = []
    for number, rows in enumerate(alone):
        assert rows.rounds is not None
        assert np.array_equal(rows.position, rows.rounds.position)
        ids = rows.round_id[rows.rounds.first]
        assert np.array_equal(np.repeat(ids, rows.rounds.lengths), rows.round_id)
        seen += ids.tolist()
        parts = [share[number] for share in shares]
        assert np.array_equal(np.concatenate([part.row for part in parts]), rows.row)
        for part in parts:
            assert len(part) == 0 or np.array_equal(part.position, part.rounds.position)
    assert len(seen) == len(set(seen)) == 400


def test_scans_hold_whole_rounds_and_ranges_are_those_of_the_whole_scan() -> None:
    log = TableLog(slates(400), SCHEMA, rows_per_group=64)
    made = encoding(log)
    whole = list(scan(log, CATALOGUE, made, 20))
    for rows in whole:
        assert np.array_equal(rows.position, rows.rounds.position)
    assert np.concatenate([rows.row for rows in whole]).tolist() == list(range(log.num_rows))
    for start in (0, 100, 240):
        part = scan(log, CATALOGUE, made, 20, rows=range(start, start + 60))
        expected = [rows.row.tolist() for rows in whole if start <= rows.row[0] < start + 60]
        assert [rows.row.tolist() for rows in part] == expected
