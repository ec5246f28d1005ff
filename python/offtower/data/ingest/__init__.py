"""Ingest CSV, Parquet and Arrow files as a checked log and catalogue."""

from offtower.data.ingest.files import ingest_files, ingest_open_bandit
from offtower.data.ingest.histories import HistoryOptions
from offtower.data.ingest.plan import IngestSource, IngestSummary, Split

__all__ = [
    "HistoryOptions",
    "IngestSource",
    "IngestSummary",
    "Split",
    "ingest_files",
    "ingest_open_bandit",
]
