"""Logs and catalogues: schema, Parquet reading and checking, encodings, order, simulators."""

from offtower.data.catalogue import Catalogue, write_catalogue
from offtower.data.check import BadRow, BadRowsError, RowChecker, check_table
from offtower.data.encoding import FeatureEncoding
from offtower.data.log import Log, ParquetLog, TableLog, write_log
from offtower.data.rows import EncodedRows, encode_rows
from offtower.data.schema import CatalogueSchema, FeatureSpec, LogSchema
from offtower.data.validate import Finding, ValidationReport, validate_log

__all__ = [
    "BadRow",
    "BadRowsError",
    "Catalogue",
    "CatalogueSchema",
    "EncodedRows",
    "FeatureEncoding",
    "FeatureSpec",
    "Finding",
    "Log",
    "LogSchema",
    "ParquetLog",
    "RowChecker",
    "TableLog",
    "ValidationReport",
    "check_table",
    "encode_rows",
    "validate_log",
    "write_catalogue",
    "write_log",
]
