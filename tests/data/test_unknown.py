"""Counts of values that training did not see."""

from __future__ import annotations

import pyarrow as pa

from offtower.data.encoding import FeatureEncoding
from offtower.data.schema import FeatureSpec
from offtower.data.unknown import UnknownValues

SPECS = (
    FeatureSpec(name="age", kind="numeric"),
    FeatureSpec(name="country", kind="category"),
    FeatureSpec(name="tags", kind="bag"),
    FeatureSpec(name="hashed", kind="category", encoding="hash", buckets=8),
)


def table(countries: list[str | None], tags: list[list[str] | None]) -> pa.Table:
    n = len(countries)
    return pa.table(
        {
            "age": [1.0] * n,
            "country": pa.array(countries, pa.string()),
            "tags": pa.array(tags, pa.list_(pa.string())),
            "hashed": ["x"] * n,
        }
    )


def test_unseen_and_missing_values_are_counted() -> None:
    encoding = FeatureEncoding.fit(SPECS, [table(["de", "fr"], [["a"], ["b", "c"]])])
    found, more = UnknownValues(), UnknownValues()
    found.add_table(encoding, table(["de", "xx", None, "yy"], [["a", "z"], ["a"], None, []]))
    more.add_table(encoding, table(["fr", "zz"], [["b"], ["q", "q"]]))
    found.merge(more)
    assert found.to_dict() == {
        "country": {"rows": 6, "unknown": 4, "missing": 1},
        "tags": {"rows": 6, "unknown": 2, "missing": 0},
    }
    assert "4 of 6 contexts (66.67%)" in found.sentences("contexts")[0]


def test_known_values_give_no_sentence() -> None:
    seen = table(["de", "fr"], [["a"], ["b"]])
    found = UnknownValues()
    found.add_table(FeatureEncoding.fit(SPECS, [seen]), seen)
    assert found.sentences("rows") == [] and found.to_dict() == {}
