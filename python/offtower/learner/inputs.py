"""Contexts, feedback and items that a learner is given, in all their forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from scipy import sparse
from sklearn.utils.validation import check_array, validate_data

from offtower.data.catalogue import Catalogue
from offtower.data.log import Log
from offtower.data.schema import CatalogueSchema, LogSchema
from offtower.errors import DataError, OfftowerError
from offtower.learner.eligible import of_mask, of_table
from offtower.learner.feedback import (
    COLUMNS,
    InputForms,
    as_table,
    check_range,
    is_feedback,
    is_frame,
    log_of_arrays,
    log_of_table,
    numeric_matrix,
    split_feedback,
    with_logged,
)
from offtower.learner.settings import LearnerSettings
from offtower.ops import Eligibility

_FLOATS = [np.float64, np.float32]
"""Accepted as they are; other numbers become float64."""


class LearnerInputs(LearnerSettings):
    """Reads what the methods of a learner are given, checked as scikit-learn does."""

    catalogue_: Catalogue
    forms_: InputForms

    def _open(
        self, X: Any, logged: tuple[Any, Any, Any], action_context: Any, fitted: InputForms | None
    ) -> tuple[Log, Catalogue, InputForms]:
        """The log and the catalogue of feedback in any form, and the forms of its inputs.

        Args:
            logged: y, reward, pscore.
            fitted: forms of the fit; None to choose them.
        """
        if isinstance(X, tuple):
            return X[0], X[1], COLUMNS
        if is_frame(X) and self.schema is not None:
            schema, item_schema = self._log_schema(self.schema), self.catalogue_schema
            if item_schema is not None and not isinstance(item_schema, CatalogueSchema):
                item_schema = CatalogueSchema.from_dict(item_schema)
            table = with_logged(as_table(X), schema, logged)
            items = None if action_context is None else as_table(action_context)
            return *log_of_table(table, schema, items, item_schema), COLUMNS
        feedback = self._feedback(X, logged, action_context, reset=fitted is None)
        return log_of_arrays(feedback, fitted, detect=self.objective == "auto")

    def _feedback(
        self, X: Any, logged: tuple[Any, Any, Any], action_context: Any, *, reset: bool
    ) -> dict[str, Any]:
        """A bandit-feedback dict of arrays given as one or apart."""
        if is_feedback(X):
            feedback = dict(X)
            if feedback.get("context") is None:
                raise DataError(f"the bandit feedback has no 'context'; it has {', '.join(X)}")
            if reset:
                # What an earlier fit on a data frame left.
                self.__dict__.pop("feature_names_in_", None)
                self.n_features_in_ = _array(feedback["context"]).shape[-1]
        else:
            context = self._contexts(X, reset=reset)
            action, reward, pscore = split_feedback(*logged)
            feedback = {"context": context, "action": action, "reward": reward, "pscore": pscore}
        if action_context is not None:
            feedback["action_context"] = action_context
        self._matrix(feedback["context"], self.dim_context_features, "context")
        if feedback.get("action_context") is not None:
            self._matrix(feedback["action_context"], self.dim_action_features, "action_context")
        return feedback

    def _contexts(self, X: Any, *, reset: bool) -> Any:
        """A matrix of contexts, checked as scikit-learn does."""
        try:
            if is_frame(X) and not hasattr(X, "iloc"):
                matrix = self._columns(as_table(X), reset=reset)
            else:
                matrix = validate_data(self, X, reset=reset, dtype=_FLOATS, accept_sparse="csr")
        except OfftowerError:
            raise
        except ValueError as error:
            raise DataError(str(error)) from None
        if not sparse.issparse(matrix):
            check_range(matrix, "context")
        return matrix

    def _columns(self, table: pa.Table, *, reset: bool) -> np.ndarray:
        """A matrix of a data frame that scikit-learn does not read."""
        names = table.column_names
        if reset:
            self.feature_names_in_ = np.asarray(names, dtype=object)
            self.n_features_in_ = len(names)
        known = list(getattr(self, "feature_names_in_", names))
        if names != known or len(names) != self.n_features_in_:
            raise DataError(
                f"the columns are {', '.join(names)}, but the learner was fitted on "
                f"{', '.join(known)}"
            )
        matrix: np.ndarray = check_array(numeric_matrix(table), dtype=_FLOATS, estimator=self)
        return matrix

    @staticmethod
    def _matrix(values: Any, width: int | None, name: str) -> Any:
        matrix = _array(values)
        if matrix.ndim != 2 or width not in (None, matrix.shape[1]):
            raise DataError(
                f"'{name}' must have shape (rows, {width or 'features'}), the width that the "
                f"learner was built with, but has shape {matrix.shape}"
            )
        return matrix

    def _eligible(self, X: Any, action_context: Any, mask: Any, rounds: int) -> Eligibility | None:
        """The sets of contexts, from a mask or from the schema's columns."""
        if mask is not None:
            return of_mask(mask, rounds)
        if self.schema is None or action_context is not None or not is_frame(X):
            return None
        return of_table(as_table(X), self._log_schema(self.schema), self.catalogue_)

    @staticmethod
    def _log_schema(schema: Any) -> LogSchema:
        """The setting `schema`, which may be a mapping."""
        return schema if isinstance(schema, LogSchema) else LogSchema.from_dict(schema)


def _array(values: Any) -> Any:
    """A dense array; a sparse one stays as it is."""
    return values if sparse.issparse(values) else np.asarray(values)


def check_column(table: pa.Table, name: str) -> None:
    if name not in table.column_names:
        raise DataError(
            f"the data frame has no column '{name}', which the schema names; it has "
            f"{', '.join(table.column_names)}"
        )
