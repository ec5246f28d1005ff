"""Columns of a log that hold each behavior policy's propensity of the logged item."""

from __future__ import annotations

from typing import Any

import numpy as np

from offtower.config import SelectionConfig
from offtower.data.columns import as_float_array, hashed
from offtower.data.log import Log
from offtower.data.rows import EncodedRows
from offtower.errors import ConfigError, DataError
from offtower.evaluation.behavior.names import BehaviorNames, check_logged, check_named
from offtower.evaluation.rows import Array, IntArray


class LoggingColumns:
    """Each behavior policy's propensity of the logged item, from columns of the log.

    Rows in the order of the log are read once; a jump reads the row group that it lands in.
    """

    def __init__(self, log: Log, names: BehaviorNames | None, options: SelectionConfig) -> None:
        assert options.logging_columns is not None
        self.columns = check_named(names, options.logging_columns, "logging_columns")
        assert names is not None
        self.names, self.tolerance, self._log = names, options.logging_tolerance, log
        self._group, self._first = -1, 0
        self._values = np.zeros((0, len(self.columns)))
        self._append()
        # Refuse wrong columns before anything is computed.
        schema = log.schema
        assert schema.behavior_policy is not None
        if schema.pscore is not None:
            first = log.read_row_group(0, [schema.behavior_policy, schema.pscore])
            owner = names.index(hashed(first.column(schema.behavior_policy)))
            pscore = as_float_array(first.column(schema.pscore))
            self._check(self._values, owner, pscore, np.arange(len(owner)))

    def of(self, rows: EncodedRows) -> Array:
        """(n, P) probabilities of a batch.

        Raises DataError for a value that is no probability, or one that is not the logged one.
        """
        if not self._first <= int(rows.row[0]) <= self._first + len(self._values):
            self._seek(int(rows.row[0]))
        while self._first + len(self._values) <= int(rows.row[-1]):
            self._append()
        found = self._values[rows.row - self._first]
        keep = int(rows.row[-1]) + 1 - self._first
        self._values, self._first = self._values[keep:], self._first + keep
        assert rows.behavior_policy is not None
        self._check(found, self.names.index(rows.behavior_policy), rows.pscore, rows.row)
        return found

    def _check(self, found: Array, owner: IntArray, pscore: Array | None, row: IntArray) -> None:
        assert pscore is not None
        for number, name in enumerate(self.names.name):
            own = np.flatnonzero(owner == number)
            check_logged(
                row[own],
                pscore[own],
                found[own, number],
                self.tolerance,
                f"the column '{self.columns[number]}', which evaluation.selection.logging_columns "
                f"names for the behavior policy '{name}',",
                "on its own rows it must hold what the column of logged propensities holds",
            )

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the values that were read."""
        return {**self.__dict__, "_group": -1, "_first": 0, "_values": self._values[:0]}

    def _seek(self, row: int) -> None:
        first = self._log.first_rows
        group = int(np.searchsorted(first, row, side="right")) - 1
        self._group, self._first, self._values = group - 1, int(first[group]), self._values[:0]

    def _append(self) -> None:
        self._group += 1
        table = self._log.read_row_group(self._group, list(dict.fromkeys(self.columns)))
        for column in self.columns:
            if column not in table.column_names:
                raise ConfigError(
                    f"evaluation.selection.logging_columns names the column '{column}', which the "
                    f"log '{self._log.location(self._group).file}' does not have"
                )
        values = np.stack([as_float_array(table.column(name)) for name in self.columns], axis=1)
        bad = ~((values >= 0.0) & (values <= 1.0 + 1e-9))
        if bad.any():
            row, place = (int(x) for x in np.argwhere(bad)[0])
            raise DataError(
                f"column '{self.columns[place]}' is {values[row, place]} in row "
                f"{int(self._log.first_rows[self._group]) + row} of the log; a propensity lies in "
                "[0, 1]"
            )
        self._values = np.concatenate([self._values, values])
