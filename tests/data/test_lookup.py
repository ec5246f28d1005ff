"""Places of values among distinct ones, against a dictionary."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offtower.data import lookup
from offtower.data.lookup import Lookup, Vocabulary

INTEGERS = st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 8)
TEXT = st.text(max_size=3)


def expected(values: list[Any], asked: list[Any]) -> list[int]:
    place = {value: i for i, value in enumerate(values)}
    return [-1 if value is None else place.get(value, -1) for value in asked]


@settings(max_examples=60)
@given(st.data())
@pytest.mark.parametrize("kind, type_", [(INTEGERS, pa.int64()), (TEXT, pa.string())])
def test_lookups_equal_those_of_a_dictionary(kind: Any, type_: Any, data: Any) -> None:
    values = sorted(data.draw(st.lists(kind, unique=True, max_size=12)))
    asked = data.draw(st.lists(st.none() | kind | st.sampled_from(values or [None]), max_size=12))
    vocabulary = Vocabulary(pa.array(values, type_))
    for one in (vocabulary, pickle.loads(pickle.dumps(vocabulary))):
        for _ in range(2):
            assert one.find(pa.array(asked, type_)).tolist() == expected(values, asked)


@settings(max_examples=60)
@given(st.lists(INTEGERS, unique=True, min_size=1, max_size=12), st.lists(INTEGERS, max_size=12))
def test_integers_in_any_order(values: list[int], asked: list[int]) -> None:
    found = Lookup(pa.array(values, pa.int64()))
    for one in (found, Lookup.of_parts(found.parts())):
        got = one.find(pa.array(asked + values, pa.int64()))
        assert got.tolist() == expected(values, asked + values)
    assert found.duplicate is None


def test_rising_integers_take_no_memory() -> None:
    values = pa.array(np.arange(5, 1000))
    found = Lookup(values)
    assert found._order is None and not found._sorted.flags.owndata
    assert Lookup(pa.array([3, 1, 2]))._order is not None


def test_equal_values_are_reported() -> None:
    assert Lookup(pa.array([4, 2, 9, 2])).duplicate == (1, 3)


def _lengths(values: pa.Array) -> Any:
    return np.array([len(x) for x in values.to_pylist()], dtype=np.uint64)


@settings(max_examples=60)
@given(st.lists(TEXT, unique=True, min_size=1, max_size=12), st.lists(TEXT, max_size=12))
def test_texts_with_one_hash(values: list[str], asked: list[str]) -> None:
    """Values share a key with each other, and with texts that are not among them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lookup, "hash_values", _lengths)
        found = Lookup(pa.array(values, pa.large_string()))
        assert found.duplicate is None
        for one in (found, Lookup.of_parts(found.parts())):
            got = one.find(pa.array(asked + values, pa.string()))
            assert got.tolist() == expected(values, asked + values)
        again = values.index(values[-1]), len(values)
        assert Lookup(pa.array([*values, values[-1]])).duplicate == again
        known = sorted(values)
        vocabulary = Vocabulary(pa.array(known, pa.string()))
        assert vocabulary.find(pa.array([None, *asked], pa.string())).tolist() == [
            -1,
            *expected(known, asked),
        ]
