"""Extended encodings against a dictionary that follows the stated rules."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offtower.data.encoding import FeatureEncoding
from offtower.data.encoding_fit import EncodingSums
from offtower.data.extension import (
    Extension,
    ExtensionBasis,
    ExtensionRules,
    TableRows,
    check_removed,
    load_rows,
    save_rows,
)
from offtower.data.schema import FeatureSpec
from offtower.errors import DataError

COLOR = FeatureSpec(name="color", kind="category")


def sums(table: pa.Table, *specs: FeatureSpec) -> EncodingSums:
    return EncodingSums.of(specs or (COLOR,), [table], None)


def colors(*values: object) -> pa.Table:
    return pa.table({"color": pa.array(values)})


def extend(
    before: FeatureEncoding,
    table: pa.Table,
    rules: ExtensionRules | None = None,
    rows: dict[str, TableRows] | None = None,
    number: int = 1,
) -> Extension:
    basis = ExtensionBasis(before, rows or {}, number, rules or ExtensionRules(), True, {})
    return basis.extend(sums(table, *before.specs), "the log")


def test_known_values_keep_their_rows_and_new_ones_follow_sorted() -> None:
    before = FeatureEncoding.fit((COLOR,), [colors("b", "d")])
    found = extend(before, colors("c", "d", "a", None))
    assert found.encoding.vocabulary("color").to_pylist() == ["b", "d", "a", "c"]
    rows = found.rows["color"]
    assert rows.origin.tolist() == [0, 1, 2, -1, -1] and rows.new.tolist() == [3, 4]
    assert rows.seen.tolist() == [0, 1, 1, 1] and rows.text == "2 known, 2 new"
    codes = found.encoding.encode(colors("a", "b", "c", "d", "e", None))["color"]
    assert isinstance(codes, np.ndarray) and codes.tolist() == [3, 1, 4, 2, 0, 0]


@st.composite
def days(draw: st.DrawFn) -> list[list[int]]:
    values = st.lists(st.integers(0, 12), max_size=12)
    return draw(st.lists(values, min_size=2, max_size=7))


@given(days(), st.integers(1, 3), st.one_of(st.none(), st.integers(1, 3)))
def test_values_are_admitted_and_evicted_by_the_rules(
    log: list[list[int]], min_count: int, evict_after: int | None
) -> None:
    spec = FeatureSpec(name="color", kind="category", min_count=min_count)
    rules = ExtensionRules(evict_after=evict_after)
    encoding = FeatureEncoding.fit((spec,), [colors(*log[0], *[0] * min_count)])
    row_of = {v: r + 1 for r, v in enumerate(encoding.vocabulary("color").to_pylist())}
    seen, waiting = dict.fromkeys(row_of, 0), dict[int, tuple[int, int]]()
    rows: dict[str, TableRows] = {}
    for number, day in enumerate(log[1:], start=1):
        found = extend(
            encoding, pa.table({"color": pa.array(day, pa.int64())}), rules, rows, number
        )
        for value in sorted(set(day)):
            if value in row_of:
                seen[value] = number
            else:
                waiting[value] = (waiting.get(value, (0, 0))[0] + day.count(value), number)

        def recent(last: int, number: int = number) -> bool:
            return evict_after is None or number - last < evict_after

        new = sorted(v for v, (count, _) in waiting.items() if count >= min_count)
        waiting = {v: w for v, w in waiting.items() if v not in new and recent(w[1])}
        kept = [v for v in row_of if recent(seen[v])]
        expected = [0, *(row_of[v] for v in kept), *[-1] * len(new)]
        assert found.rows["color"].origin.tolist() == expected
        assert found.encoding.vocabulary("color").to_pylist() == [*kept, *new]
        row_of = {v: r + 1 for r, v in enumerate([*kept, *new])}
        seen |= dict.fromkeys(new, number)
        encoding, rows = found.encoding, dict(found.rows)


def test_means_stay_or_move_as_stated() -> None:
    spec = FeatureSpec(name="age", kind="numeric")
    before = FeatureEncoding.fit((spec,), [pa.table({"age": [0.0, 2.0]})])
    table = pa.table({"age": [10.0, 14.0]})
    same = extend(before, table).encoding
    assert np.asarray(same.encode(table)["age"]).tolist() == [9.0, 13.0]
    moved = extend(before, table, ExtensionRules(moving=0.25)).encoding
    scale = np.sqrt(0.75 * 1.0 + 0.25 * 4.0)
    expected = (np.array([10.0, 14.0]) - (0.75 * 1.0 + 0.25 * 12.0)) / scale
    np.testing.assert_allclose(np.asarray(moved.encode(table)["age"]), expected, rtol=1e-6)


def test_items_follow_the_catalogue_at_once() -> None:
    before = FeatureEncoding.fit((COLOR,), [colors("a", "b", "c")])
    ids = {"color": pa.array(["a", "c", "d"])}
    basis = ExtensionBasis(before, {}, 1, ExtensionRules(min_count=9), False, ids)
    found = basis.extend(sums(colors("a", "c", "d")), "the catalogue")
    assert found.encoding.vocabulary("color").to_pylist() == ["a", "c", "d"]
    assert found.rows["color"].origin.tolist() == [0, 1, 3, -1]
    assert found.rows["color"].text == "2 known, 1 new, 1 removed"


VECTOR = FeatureSpec(name="v", kind="vector")
TITLE = FeatureSpec(name="color", kind="text")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (COLOR, FeatureSpec(name="color", kind="bag"), "kind 'category' -> 'bag'"),
        (COLOR, FeatureSpec(name="hue", kind="category"), "no feature 'color'"),
        (COLOR, FeatureSpec(name="color", kind="category", embedding_dim=4), "embedding_dim"),
        (
            COLOR,
            FeatureSpec(name="color", kind="category", column="hue"),
            "source 'color' -> 'hue'",
        ),
        (VECTOR, VECTOR, "dim 2 -> 3"),
        (TITLE, replace(TITLE, tokens="words"), "hashed_tokens 'subwords' -> 'words'"),
        (TITLE, replace(TITLE, length=9), "most_characters 512 -> 9"),
    ],
)
def test_other_features_are_refused_with_the_reason(
    before: FeatureSpec, after: FeatureSpec, message: str
) -> None:
    old = pa.table({"color": ["a"], "v": [[1.0, 2.0]]})
    lists = pa.array([["a"]]) if after.kind == "bag" else pa.array(["a"])
    new = pa.table({"color": lists, "hue": ["a"], "v": [[1.0, 2.0, 3.0]]})
    basis = ExtensionBasis(FeatureEncoding.fit((before,), [old]), {}, 1, ExtensionRules(), True, {})
    with pytest.raises(DataError, match=message) as found:
        basis.extend(sums(new, after), "the log")
    assert "incremental.from_run" in str(found.value)


def test_a_default_that_is_named_is_no_change() -> None:
    old = FeatureEncoding.fit((TITLE,), [colors("a")])
    basis = ExtensionBasis(old, {}, 1, ExtensionRules(), True, {})
    named = replace(TITLE, tokens="subwords", length=512)
    assert basis.extend(sums(colors("b"), named), "the log").encoding.specs == (TITLE,)


def test_text_for_a_feature_of_integers_is_refused() -> None:
    before = FeatureEncoding.fit((COLOR,), [colors(1, 2)])
    assert extend(before, colors("1", "2")).rows["color"].text == "2 known"
    with pytest.raises(DataError, match="'red' is none"):
        extend(before, colors("1", "red"))


def test_a_vocabulary_that_grew_tenfold_is_refused_unless_allowed() -> None:
    before = FeatureEncoding.fit((COLOR,), [colors(*range(100))])
    with pytest.raises(DataError, match=r"900 new values beside 100 known .*max_growth"):
        extend(before, colors(*range(1000)))
    found = extend(before, colors(*range(1000)), ExtensionRules(max_growth=10.0))
    assert found.rows["color"].text == "100 known, 900 new"


def test_a_catalogue_that_lost_half_its_items_is_refused_unless_allowed() -> None:
    before, after = pa.array(range(10)), pa.array(range(5, 12))
    with pytest.raises(DataError, match=r"lacks 5 of the 10 items .*incremental.max_removed"):
        check_removed(before, after, 0.3, "the catalogue")
    text = check_removed(before, after, 1.0, "the catalogue")
    assert text == "5 items stay, 2 are new, 5 left"
    with pytest.raises(DataError, match="lacks 3 of the 10 items"):
        check_removed(10, after, 0.2, "the catalogue")


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    before = FeatureEncoding.fit((COLOR,), [colors("a")])
    found = extend(before, colors("a", "b", "b", "c"), ExtensionRules(min_count=2))
    save_rows(tmp_path / "rows", found.rows)
    read = load_rows(tmp_path / "rows")["color"]
    assert read.origin.tolist() == [0, 1, -1] and read.seen.tolist() == [1, 1]
    assert read.waiting is not None
    assert read.waiting.to_pylist() == [{"value": "c", "count": 1, "seen": 1}]
    assert load_rows(tmp_path / "none") == {}
