"""Export, index, search, and draws with known propensities."""

from offtower.retrieval.export import ExportOptions, export_run
from offtower.retrieval.index import IndexOptions
from offtower.retrieval.quality import RetrievalQuality, retrieval_quality
from offtower.retrieval.retriever import Found, Retriever, Served
from offtower.retrieval.sampling import Draws, PropensitySampler
from offtower.retrieval.served_log import decisions_table, served_schema, with_rewards

__all__ = [
    "Draws",
    "ExportOptions",
    "Found",
    "IndexOptions",
    "PropensitySampler",
    "RetrievalQuality",
    "Retriever",
    "Served",
    "decisions_table",
    "export_run",
    "retrieval_quality",
    "served_schema",
    "with_rewards",
]
