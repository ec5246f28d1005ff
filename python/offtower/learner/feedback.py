"""Forms in which a learner accepts contexts and logged feedback."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy import sparse

from offtower.data.catalogue import Catalogue
from offtower.data.columns import distinct_values
from offtower.data.convert import ITEM_VECTOR, from_bandit_feedback
from offtower.data.indicators import as_ids, as_tokens, is_indicator, is_one_hot
from offtower.data.log import Log, TableLog
from offtower.data.schema import CatalogueSchema, FeatureSpec, LogSchema
from offtower.data.simulate.features import vector_array
from offtower.data.vectors import LARGEST
from offtower.errors import DataError
from offtower.learner.eligible import COLUMN, with_candidates

CONTEXT = "context"
"""Column of a matrix of contexts."""

ContextForm = Literal["vectors", "tokens", "counts", "columns"]
"""tokens: zeros and ones; counts: a sparse matrix of whole numbers; columns: of a table."""
ItemForm = Literal["vectors", "ids", "numbers", "columns"]
"""ids: one-hot rows; numbers: the actions have no features."""

_LARGEST_COUNT = 100


@dataclass(frozen=True)
class InputForms:
    """How the contexts and the items of a fit are read, and so those of a prediction."""

    context: ContextForm
    items: ItemForm


COLUMNS = InputForms("columns", "columns")


def logged_feedback(action: Any, reward: Any, pscore: Any = None) -> NDArray[Any]:
    """Join actions, rewards and propensities in one (n,) structured array.

    It is the `y` of `TwoTowerPolicyLearner.fit` and of scikit-learn's model selection, which
    splits it by row.

    Raises:
        DataError: the lengths differ.
    """
    columns = {"action": np.asarray(action), "reward": np.asarray(reward, dtype=np.float64)}
    if pscore is not None:
        columns["pscore"] = np.asarray(pscore, dtype=np.float64)
    shapes = {name: column.shape for name, column in columns.items()}
    if len(set(shapes.values())) != 1 or columns["action"].ndim != 1:
        raise DataError(f"action, reward and pscore must have one shape (rows,), but have {shapes}")
    joined = np.empty(len(columns["action"]), [(name, c.dtype) for name, c in columns.items()])
    for name, column in columns.items():
        joined[name] = column
    return joined


def split_feedback(
    y: Any, reward: Any, pscore: Any
) -> tuple[NDArray[Any], NDArray[np.float64], NDArray[np.float64] | None]:
    """Return action, reward and pscore, given apart or joined by `logged_feedback`.

    Raises:
        DataError: actions or rewards are missing.
    """
    if y is None:
        raise DataError(
            "TwoTowerPolicyLearner requires y to be passed, but the target y is None: pass the "
            "logged actions as y with reward=, or a bandit-feedback dict, or a data frame with "
            "the schema's columns"
        )
    y = np.asarray(y)
    if y.dtype.names is not None:
        names = y.dtype.names
        if "action" not in names or "reward" not in names:
            raise DataError(f"y has the fields {', '.join(names)}; it needs action and reward")
        return y["action"], y["reward"], y["pscore"] if "pscore" in names else pscore
    if reward is None:
        raise DataError(
            "rewards are missing: pass reward= beside the actions, or join both by "
            "offtower.learner.logged_feedback(action, reward, pscore)"
        )
    scores = None if pscore is None else np.asarray(pscore, dtype=np.float64)
    return y, np.asarray(reward, dtype=np.float64), scores


def is_feedback(values: Any) -> bool:
    """Whether values are a bandit-feedback dict; a sparse matrix of scipy may be a mapping too."""
    return isinstance(values, Mapping) and not hasattr(values, "tocsr")


def is_frame(values: Any) -> bool:
    """Whether values are a data frame: of pandas, or of any library that exports Arrow."""
    if isinstance(values, np.ndarray):
        return False
    return hasattr(values, "__arrow_c_stream__") or (
        hasattr(values, "iloc") and hasattr(values, "columns")
    )


def as_table(frame: Any) -> pa.Table:
    """Convert a data frame to a table, without the index of pandas.

    Raises:
        DataError: it cannot be converted.
    """
    try:
        if isinstance(frame, pa.Table):
            return frame
        if hasattr(frame, "iloc"):
            return pa.Table.from_pandas(frame, preserve_index=False)
        return pa.table(frame)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise DataError(f"the data frame cannot be read as a table: {error}") from error


def numeric_matrix(table: pa.Table) -> NDArray[Any]:
    """Convert columns of numbers to a (rows, columns) matrix.

    Raises:
        DataError: a column holds no numbers.
    """
    columns = []
    for name in table.column_names:
        try:
            columns.append(table.column(name).cast(pa.float64()).to_numpy())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise DataError(
                f"column '{name}' holds {table.column(name).type}, not numbers; to use categories, "
                f"bags and times, name the columns by TwoTowerPolicyLearner(schema=...) ({error})"
            ) from None
    return np.column_stack(columns) if columns else np.zeros((table.num_rows, 0))


def counted_tokens(matrix: Any) -> pa.Array:
    """Return (rows,) lists of columns, each as often as its count in a sparse matrix.

    Memory is proportional to the sum of the counts; nothing is dense.

    Raises:
        DataError: a value is no whole number from 0 to 100.
    """
    csr = sparse.csr_array(matrix)
    csr.sum_duplicates()
    count = csr.data.astype(np.int64) if np.isfinite(csr.data).all() else csr.data
    if not ((count == csr.data) & (count >= 0) & (count <= _LARGEST_COUNT)).all():
        raise DataError(
            "a sparse context matrix must hold counts, whole numbers from 0 to "
            f"{_LARGEST_COUNT}: round or bin its values, or pass a dense matrix (X.toarray())"
        )
    ends = np.concatenate([[0], np.cumsum(count)])[csr.indptr]
    kind = pa.int32() if ends[-1] < 2**31 else pa.int64()
    make = pa.ListArray if kind == pa.int32() else pa.LargeListArray
    values = pa.array(np.repeat(csr.indices.astype(np.int64), count))
    return make.from_arrays(pa.array(ends, kind), values)


def check_range(matrix: NDArray[Any], name: str) -> None:
    """Refuse numbers that float32 cannot hold.

    Raises:
        DataError: there is one.
    """
    if matrix.size and (matrix.max() > LARGEST or matrix.min() < -LARGEST):
        raise DataError(f"'{name}' holds a value too large for dtype('float32')")


def feature_column(matrix: Any, form: str) -> pa.Array:
    """A matrix of contexts or items as the column that a learner of this form encodes.

    Raises:
        DataError: a sparse matrix, and the learner was fitted on a dense one.
    """
    if form == "counts":
        return counted_tokens(matrix)
    if sparse.issparse(matrix):
        raise DataError("the learner was fitted on a dense matrix, and this one is sparse")
    if form == "tokens":
        return as_tokens(np.asarray(matrix))
    if form == "ids":
        return as_ids(matrix)
    # As in the fit: float32 stays, other numbers are float64 until they are standardized.
    return vector_array(matrix if matrix.dtype == np.float32 else matrix.astype(np.float64))


def log_of_arrays(
    feedback: Mapping[str, Any], forms: InputForms | None, detect: bool
) -> tuple[TableLog, Catalogue, InputForms]:
    """Convert a bandit-feedback dict to a log and a catalogue.

    Args:
        feedback: without `action_context` the catalogue holds the numbers of the items alone.
        forms: those of the fit, for other feedback; None to choose them.
        detect: read a context of zeros and ones, mostly zeros, as tokens, and one-hot items as ids.

    Raises:
        DataError: a key is missing or an array has another shape.
    """
    context, items = feedback.get("context"), feedback.get("action_context")
    if forms is None:
        by_id = detect and items is not None and is_one_hot(np.asarray(items))
        form: ContextForm = "counts" if sparse.issparse(context) else "vectors"
        if form == "vectors" and detect and is_indicator(np.asarray(context)):
            form = "tokens"
        forms = InputForms(
            form,
            "numbers" if items is None else "ids" if by_id else "vectors",
        )
    plain = dict(feedback)
    # Features that become ids or tokens are not copied as numbers first.
    if forms.context != "vectors":
        shaped: Any = context if sparse.issparse(context) else np.asarray(context)
        rows = shaped.shape[0]
        plain["context"] = np.zeros((rows, 1), dtype=np.float32)
    if items is None:
        action = np.asarray(feedback.get("action"))
        if action.dtype.kind not in "iu":
            raise DataError(
                f"'action' must hold the numbers of the actions, but holds {action.dtype}; name "
                "the columns by TwoTowerPolicyLearner(schema=...) to use ids"
            )
        plain["action_context"] = np.zeros((1 + int(action.max(initial=0)), 1))
    elif forms.items == "ids":
        plain["action_context"] = np.zeros((len(np.asarray(items)), 1))
    log, catalogue = from_bandit_feedback(plain, CONTEXT)
    if forms.context != "vectors":
        column = log.table.column_names.index(CONTEXT)
        tokens = feature_column(context, forms.context)
        table = log.table.set_column(column, CONTEXT, tokens)
        bag = FeatureSpec(name=CONTEXT, kind="bag")
        log = TableLog(table, replace(log.schema, context=(bag,)))
    if items is None or forms.items == "ids":
        ids = pa.array(np.arange(catalogue.num_items))
        column = ids if items is None else as_ids(np.asarray(items))
        feature = FeatureSpec(name=ITEM_VECTOR, kind="category")
        catalogue = Catalogue.from_table(
            pa.table({"item_id": ids, ITEM_VECTOR: column}),
            CatalogueSchema(item_id="item_id", features=(feature,)),
        )
    if feedback.get(COLUMN) is not None:
        log = with_candidates(log, feedback[COLUMN])
    return log, catalogue, forms


def log_of_table(
    table: pa.Table, schema: LogSchema, items: pa.Table | None, item_schema: CatalogueSchema | None
) -> tuple[Log, Catalogue]:
    """A log of a table with the schema's columns; without `items` those that it shows.

    Raises:
        DataError: a column is missing.
    """
    log = TableLog(table, schema)
    if items is None:
        if item_schema is None:
            by_id = FeatureSpec(name="item_id", kind="category")
            item_schema = CatalogueSchema(features=(by_id,))
        shown = distinct_values(table.column(schema.action))[0]
        items = pa.table({item_schema.item_id: shown.take(pc.sort_indices(shown))})
    item_schema = (item_schema or CatalogueSchema()).keeping(schema.eligible)
    return log, Catalogue.from_table(items, item_schema)


def with_logged(table: pa.Table, schema: LogSchema, logged: tuple[Any, Any, Any]) -> pa.Table:
    """Add actions, rewards and propensities that are given apart, as the schema's columns."""
    if logged[0] is None:
        return table
    action, reward, pscore = split_feedback(*logged)
    for name, values in {
        schema.action: action,
        schema.reward: reward,
        schema.pscore: pscore,
    }.items():
        if name is None or values is None:
            continue
        if name in table.column_names:
            table = table.drop_columns(name)
        table = table.append_column(name, pa.array(values))
    return table


def joined_table(log: Log) -> pa.Table:
    """All rows of a log."""
    return pa.concat_tables(log.tables())
