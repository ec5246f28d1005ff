"""Conversion from and to the bandit-feedback dict of Open Bandit Pipeline (OBP)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from offtower.data.catalogue import Catalogue
from offtower.data.log import Log, TableLog
from offtower.data.schema import CatalogueSchema, FeatureSpec, LogSchema
from offtower.data.simulate.features import vector_array, vector_matrix
from offtower.errors import DataError

BanditFeedback = dict[str, Any]

ITEM_VECTOR = "action_context"
_TRUTH = ("expected_reward", "pi_b")
"""Known in simulations only; additional columns of the log."""

_MOST_COLUMNS = 100_000


def from_bandit_feedback(
    feedback: Mapping[str, Any],
    context_name: str = "context",
    reward_range: tuple[float, float] | None = None,
) -> tuple[TableLog, Catalogue]:
    """Convert OBP's dict to a log in memory and a catalogue of the actions 0 .. n_actions - 1.

    Args:
        feedback: `context` (n, d), `action` (n,), `reward` (n,), `pscore` (n,) or None,
            `action_context` (n_actions, k), and where present `position` (n,), `expected_reward`
            (n, n_actions), `pi_b` (n, n_actions[, 1]).
        context_name: name of the log's only feature, a vector.
        reward_range: smallest and largest possible reward; by default (0, 1), extended to the
            rewards found.

    Raises:
        DataError: a key is missing or an array has another shape. Values are checked when rows are
            read.
    """
    context = _matrix(feedback, "context")
    item_vectors = _matrix(feedback, "action_context")
    n_rounds, n_actions = len(context), len(item_vectors)
    if feedback.get("n_actions", n_actions) != n_actions:
        raise DataError(
            f"n_actions is {feedback['n_actions']}, but action_context has {n_actions} rows"
        )
    action = _vector(feedback, "action", n_rounds)
    if action.dtype.kind not in "iu":
        raise DataError(f"'action' must hold integers, but holds {action.dtype}")
    reward = _vector(feedback, "reward", n_rounds).astype(np.float64)
    if reward_range is None:
        finite = reward[np.isfinite(reward)]
        low, high = float(finite.min(initial=0.0)), float(finite.max(initial=1.0))
        reward_range = (low, high)
    columns = {
        context_name: vector_array(context),
        "action": pa.array(action.astype(np.int64)),
        "reward": pa.array(reward),
    }
    optional: dict[str, str] = {}
    for key, kind in (("pscore", np.float64), ("position", np.int64)):
        if feedback.get(key) is not None:
            columns[key] = pa.array(_vector(feedback, key, n_rounds).astype(kind))
            optional[key] = key
    for key in _TRUTH:
        if feedback.get(key) is not None:
            values = np.asarray(feedback[key], dtype=np.float64)
            if values.ndim == 3 and values.shape[2] == 1:
                values = values[:, :, 0]
            if values.shape != (n_rounds, n_actions):
                raise DataError(
                    f"'{key}' must have shape ({n_rounds}, {n_actions}), but has {values.shape}"
                )
            columns[key] = vector_array(values)
    schema = LogSchema(
        context=(FeatureSpec(name=context_name, kind="vector", dim=context.shape[1]),),
        pscore=optional.get("pscore"),
        position=optional.get("position"),
        pscore_kind="marginal" if "position" in optional else None,
        reward_range=reward_range,
    )
    items = pa.table(
        {
            "item_id": pa.array(np.arange(n_actions)),
            ITEM_VECTOR: vector_array(item_vectors),
        }
    )
    catalogue_schema = CatalogueSchema(
        item_id="item_id",
        features=(FeatureSpec(name=ITEM_VECTOR, kind="vector", dim=item_vectors.shape[1]),),
    )
    return TableLog(pa.table(columns), schema), Catalogue.from_table(items, catalogue_schema)


def to_bandit_feedback(log: Log, catalogue: Catalogue) -> BanditFeedback:
    """Convert a log that fits into memory to OBP's dict.

    Features become columns in the schema's order: numbers as they are, vectors by dimension,
    categories one-hot by sorted value, bags as counts by sorted value.

    Returns:
        n_rounds, n_actions, context (n, d) float64, action_context (n_actions, k) float64, action
        (n,) index into the catalogue, position (n,) or None, reward (n,), pscore (n,) or None, and
        `expected_reward` (n, n_actions) and `pi_b` (n, n_actions, 1) if the log is in memory and
        has them.

    Raises:
        DataError: an action is not in the catalogue, a number is missing, or categories have too
            many values.
    """
    schema = log.schema
    if schema.weight is not None:
        raise DataError(
            f"OBP's dict has no place for the weights of rows (column '{schema.weight}'): its "
            "estimators would count every row once"
        )
    columns = list(schema.columns)
    if isinstance(log, TableLog):
        columns += [key for key in _TRUTH if key in log.table.column_names]
    groups = range(len(log.row_group_sizes))
    table = pa.concat_tables(log.read_row_groups(groups, columns))
    items = catalogue.table(0, catalogue.num_items)
    action = catalogue.index_of(table.column(schema.action))
    if (action < 0).any():
        row = int((action < 0).argmax())
        item = table.column(schema.action)[row].as_py()
        raise DataError(f"row {row}: action {item!r} is not in the catalogue")
    feedback: BanditFeedback = {
        "n_rounds": table.num_rows,
        "n_actions": catalogue.num_items,
        "context": _design(table, schema.context, "log"),
        "action_context": _design(items, catalogue.schema.features, "catalogue"),
        "action": action,
        "position": None if schema.position is None else _numbers(table, schema.position),
        "reward": _numbers(table, schema.reward),
        "pscore": None if schema.pscore is None else _numbers(table, schema.pscore),
    }
    for key in _TRUTH:
        if key in table.column_names:
            matrix = vector_matrix(_combined(table, key), catalogue.num_items)
            feedback[key] = matrix[:, :, None] if key == "pi_b" else matrix
    return feedback


def _design(table: pa.Table, specs: Sequence[FeatureSpec], side: str) -> NDArray[np.float64]:
    parts = [_feature_columns(table, spec, side) for spec in specs]
    if not parts:
        return np.zeros((table.num_rows, 0))
    return np.concatenate(parts, axis=1)


def _feature_columns(table: pa.Table, spec: FeatureSpec, side: str) -> NDArray[np.float64]:
    name = spec.source
    if spec.kind == "numeric":
        return _numbers(table, name).astype(np.float64)[:, None]
    column = _combined(table, name)
    if spec.kind == "vector":
        dim = spec.dim if spec.dim is not None else len(column[0])
        return vector_matrix(column, dim).astype(np.float64)
    if spec.kind == "text":
        raise DataError(
            f"feature '{spec.name}' of the {side} is text, which has no columns of a dense array: "
            "write vectors first (offtower embed)"
        )
    if spec.kind == "category":
        values, row = column, np.arange(len(column))
    else:
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
        values, row = pc.list_flatten(column), np.repeat(np.arange(len(column)), lengths)
    encoded = values.dictionary_encode()
    known = encoded.dictionary.drop_null()
    if len(known) > _MOST_COLUMNS:
        raise DataError(
            f"feature '{spec.name}' of the {side} has {len(known)} values; as columns of a dense "
            f"array at most {_MOST_COLUMNS} are possible"
        )
    rank = np.empty(len(known), dtype=np.int64)
    rank[pc.sort_indices(known).to_numpy()] = np.arange(len(known))
    code = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False)
    result = np.zeros((table.num_rows, len(known)))
    np.add.at(result, (row[code >= 0], rank[code[code >= 0]]), 1.0)
    return result


def _combined(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name).combine_chunks()
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _numbers(table: pa.Table, name: str) -> NDArray[Any]:
    column = table.column(name)
    if column.null_count:
        raise DataError(f"column '{name}' has {column.null_count} nulls")
    numbers: NDArray[Any] = column.to_numpy()
    return numbers


def _array(feedback: Mapping[str, Any], key: str) -> NDArray[Any]:
    if feedback.get(key) is None:
        raise DataError(f"the bandit feedback has no '{key}'; it has {', '.join(feedback)}")
    return np.asarray(feedback[key])


def _matrix(feedback: Mapping[str, Any], key: str) -> NDArray[Any]:
    values = _array(feedback, key)
    if values.ndim != 2 or values.dtype.kind not in "biuf":
        raise DataError(
            f"'{key}' must be a matrix of numbers, but has shape {values.shape} "
            f"and type {values.dtype}"
        )
    return values if values.dtype == np.float32 else values.astype(np.float64)


def _vector(feedback: Mapping[str, Any], key: str, n_rounds: int) -> NDArray[Any]:
    values = _array(feedback, key)
    if values.shape != (n_rounds,):
        raise DataError(f"'{key}' must have shape ({n_rounds},), but has {values.shape}")
    return values
