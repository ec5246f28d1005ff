from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from offtower.data.catalogue import Catalogue
from offtower.data.convert import from_bandit_feedback, to_bandit_feedback
from offtower.data.log import TableLog
from offtower.data.schema import CatalogueSchema, FeatureSpec, LogSchema
from offtower.data.simulate import obp_synthetic
from offtower.errors import DataError


def feedback(n: int = 50, position: bool = True) -> dict:
    rng = np.random.default_rng(0)
    return {
        "n_rounds": n,
        "n_actions": 4,
        "context": rng.standard_normal((n, 3)),
        "action_context": rng.standard_normal((4, 2)),
        "action": rng.integers(0, 4, n),
        "position": rng.integers(0, 2, n) if position else None,
        "reward": rng.standard_normal(n),
        "pscore": rng.uniform(0.1, 1, n),
    }


def assert_same(one: dict, other: dict) -> None:
    assert set(one) == set(other)
    for key, value in one.items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(value, other[key], err_msg=key)
            assert value.shape == other[key].shape
        else:
            assert value == other[key], key


@pytest.mark.parametrize("position", [True, False])
def test_round_trip(position: bool) -> None:
    original = feedback(position=position)
    log, catalogue = from_bandit_feedback(original)
    assert log.num_rows == 50 and catalogue.num_items == 4
    assert [spec.name for spec in log.schema.context] == ["context"]
    assert [spec.name for spec in catalogue.schema.features] == ["action_context"]
    assert_same(original, to_bandit_feedback(log, catalogue))


def test_round_trip_of_obp_with_the_truth() -> None:
    pytest.importorskip("obp")
    original = obp_synthetic(200, n_actions=5)
    log, catalogue = from_bandit_feedback(original)
    assert "expected_reward" not in log.schema.columns
    assert_same(original, to_bandit_feedback(log, catalogue))


def test_without_pscore() -> None:
    original = feedback() | {"pscore": None}
    log, catalogue = from_bandit_feedback(original, context_name="user")
    assert log.schema.pscore is None
    assert log.schema.context[0].name == "user"
    assert to_bandit_feedback(log, catalogue)["pscore"] is None


def test_weights_of_rows_have_no_place_in_the_dict() -> None:
    log, catalogue = from_bandit_feedback(feedback(position=False))
    weighted = TableLog(
        log.table.append_column("kept", pa.array(np.full(50, 0.5))),
        replace(log.schema, weight="kept"),
    )
    with pytest.raises(DataError, match="no place for the weights"):
        to_bandit_feedback(weighted, catalogue)


def test_every_kind_of_feature_becomes_columns() -> None:
    schema = LogSchema(
        context=(
            FeatureSpec(name="n", kind="numeric"),
            FeatureSpec(name="v", kind="vector", dim=2, column="raw"),
            FeatureSpec(name="c", kind="category"),
            FeatureSpec(name="b", kind="bag"),
        ),
        pscore=None,
    )
    table = pa.table(
        {
            "n": pa.array([1, 2, 3]),
            "raw": pa.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], pa.list_(pa.float32(), 2)),
            "c": pa.array(["b", None, "a"]),
            "b": pa.array([["x", "x"], [], ["y"]]),
            "action": pa.array(["q", "p", "q"]),
            "reward": pa.array([0.0, 1.0, 0.0]),
        }
    )
    catalogue = Catalogue.from_table(
        pa.table({"item_id": ["p", "q"], "kind": ["k", "l"]}),
        CatalogueSchema(item_id="item_id", features=(FeatureSpec(name="kind", kind="category"),)),
    )
    result = to_bandit_feedback(TableLog(table, schema, rows_per_group=2), catalogue)
    np.testing.assert_array_equal(
        result["context"],
        [[1, 1, 2, 0, 1, 2, 0], [2, 3, 4, 0, 0, 0, 0], [3, 5, 6, 1, 0, 0, 1]],
    )
    np.testing.assert_array_equal(result["action"], [1, 0, 1])
    np.testing.assert_array_equal(result["action_context"], np.eye(2))
    unknown = table.set_column(4, "action", pa.array(["q", "z", "q"]))
    with pytest.raises(DataError, match="row 1: action 'z' is not in the catalogue"):
        to_bandit_feedback(TableLog(unknown, schema), catalogue)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": None}, "no 'context'"),
        ({"context": np.zeros(50)}, "must be a matrix"),
        ({"action": np.zeros(49, dtype=int)}, r"shape \(50,\)"),
        ({"action": np.zeros(50)}, "must hold integers"),
        ({"n_actions": 5}, "n_actions is 5"),
        ({"pi_b": np.zeros((50, 3, 1))}, "'pi_b' must have shape"),
        ({"reward": None}, "no 'reward'"),
    ],
)
def test_wrong_shapes_are_refused(change: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_bandit_feedback(feedback() | change)
