from __future__ import annotations

import numpy as np
import pyarrow as pa

from offtower.data import EncodedRows, FeatureEncoding, encode_rows
from tests.data.conftest import ITEMS, make_catalogue, make_schema, make_table


def test_rows_become_arrays_and_survive_take_and_concat() -> None:
    table, schema = make_table(20), make_schema()
    fitted = FeatureEncoding.fit(schema.context, [table])
    rows = encode_rows(table, schema, make_catalogue(), fitted, 100)
    assert len(rows) == 20 and rows.row.tolist() == list(range(100, 120))
    assert [ITEMS[i] for i in rows.action] == table.column("action").to_pylist()
    assert rows.reward.dtype == np.float32
    assert rows.pscore is not None and rows.pscore.dtype == np.float64
    assert rows.timestamp is not None and rows.timestamp[0] == -1000
    assert rows.user_id is not None and len(set(rows.user_id.tolist())) == 5
    index = np.array([7, 3, 19])
    both = EncodedRows.concat([rows.take(index), rows])
    assert both.row[:4].tolist() == [107, 103, 119, 100] and len(both) == 23
    np.testing.assert_array_equal(both.context["age"][:3], rows.context["age"][index])
    assert both.nbytes > rows.nbytes


def test_times_become_microseconds() -> None:
    table, schema = make_table(2), make_schema()
    number = table.schema.get_field_index("time")
    times = table.set_column(number, "time", pa.array([-1, 2], pa.timestamp("s")))
    fitted = FeatureEncoding.fit(schema.context, [table])
    rows = encode_rows(times, schema, make_catalogue(), fitted, 0)
    assert rows.timestamp is not None and rows.timestamp.tolist() == [-1_000_000, 2_000_000]
