"""Logs and catalogues: schema, Parquet reading and checking, encodings, order, simulators.

Names are imported on first use, so that importing this package is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offtower.data.catalogue import Catalogue, write_catalogue
    from offtower.data.check import BadRow, BadRowsError, RowChecker, check_table
    from offtower.data.convert import from_bandit_feedback, to_bandit_feedback
    from offtower.data.encoding import BagArray, BagTensor, FeatureArrays, FeatureEncoding
    from offtower.data.findings import Finding
    from offtower.data.log import Log, ParquetLog, TableLog, write_log
    from offtower.data.obd import import_open_bandit
    from offtower.data.order import Batch, Cursor, EpochOrder, fold_of
    from offtower.data.reader import BatchReader, scan
    from offtower.data.rows import EncodedRows, encode_rows
    from offtower.data.schema import CatalogueSchema, FeatureKind, FeatureSpec, LogSchema
    from offtower.data.simulate import SimulatedWorld, WorldSettings, obp_synthetic
    from offtower.data.split import split_log
    from offtower.data.validate import ValidationReport, validate_log

_NAMES = {
    "catalogue": "Catalogue write_catalogue",
    "check": "BadRow BadRowsError RowChecker check_table",
    "convert": "from_bandit_feedback to_bandit_feedback",
    "findings": "Finding",
    "encoding": "BagArray BagTensor FeatureArrays FeatureEncoding",
    "log": "Log ParquetLog TableLog write_log",
    "obd": "import_open_bandit",
    "order": "Batch Cursor EpochOrder fold_of",
    "reader": "BatchReader scan",
    "rows": "EncodedRows encode_rows",
    "schema": "CatalogueSchema FeatureKind FeatureSpec LogSchema",
    "simulate": "SimulatedWorld WorldSettings obp_synthetic",
    "split": "split_log",
    "validate": "ValidationReport validate_log",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}

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
    "WorldSettings",
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
