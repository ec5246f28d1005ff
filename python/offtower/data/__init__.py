"""Logs and catalogues: schema, Parquet reading and checking, encodings, order, simulators.

Names are loaded when they are first asked for: importing this package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offtower.data.catalogue import Catalogue, write_catalogue
    from offtower.data.check import BadRow, BadRowsError, RowChecker, check_table
    from offtower.data.convert import from_bandit_feedback, to_bandit_feedback
    from offtower.data.encoding import BagArray, BagTensor, FeatureArrays, FeatureEncoding
    from offtower.data.log import Log, ParquetLog, TableLog, write_log
    from offtower.data.obd import import_open_bandit
    from offtower.data.order import Batch, Cursor, EpochOrder, fold_of
    from offtower.data.reader import BatchReader, scan
    from offtower.data.rows import EncodedRows, encode_rows
    from offtower.data.schema import CatalogueSchema, FeatureKind, FeatureSpec, LogSchema
    from offtower.data.simulate import SimulatedWorld, obp_synthetic
    from offtower.data.split import split_log
    from offtower.data.validate import Finding, ValidationReport, validate_log

_MODULES = {
    "Catalogue": "catalogue",
    "write_catalogue": "catalogue",
    "BadRow": "check",
    "BadRowsError": "check",
    "RowChecker": "check",
    "check_table": "check",
    "from_bandit_feedback": "convert",
    "to_bandit_feedback": "convert",
    "BagArray": "encoding",
    "BagTensor": "encoding",
    "FeatureArrays": "encoding",
    "FeatureEncoding": "encoding",
    "Log": "log",
    "ParquetLog": "log",
    "TableLog": "log",
    "write_log": "log",
    "import_open_bandit": "obd",
    "Batch": "order",
    "Cursor": "order",
    "EpochOrder": "order",
    "fold_of": "order",
    "BatchReader": "reader",
    "scan": "reader",
    "EncodedRows": "rows",
    "encode_rows": "rows",
    "CatalogueSchema": "schema",
    "FeatureKind": "schema",
    "FeatureSpec": "schema",
    "LogSchema": "schema",
    "SimulatedWorld": "simulate",
    "obp_synthetic": "simulate",
    "split_log": "split",
    "Finding": "validate",
    "ValidationReport": "validate",
    "validate_log": "validate",
}

__all__ = [
    "BadRow",
    "BadRowsError",
    "BagArray",
    "BagTensor",
    "Batch",
    "BatchReader",
    "Catalogue",
    "CatalogueSchema",
    "Cursor",
    "EncodedRows",
    "EpochOrder",
    "FeatureArrays",
    "FeatureEncoding",
    "FeatureKind",
    "FeatureSpec",
    "Finding",
    "Log",
    "LogSchema",
    "ParquetLog",
    "RowChecker",
    "SimulatedWorld",
    "TableLog",
    "ValidationReport",
    "check_table",
    "encode_rows",
    "fold_of",
    "from_bandit_feedback",
    "import_open_bandit",
    "obp_synthetic",
    "scan",
    "split_log",
    "to_bandit_feedback",
    "validate_log",
    "write_catalogue",
    "write_log",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'offtower.data' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"offtower.data.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
