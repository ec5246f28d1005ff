"""Export, index, search, and draws with known propensities."""

from offtower.retrieval.cell_sampling import ItemSample
from offtower.retrieval.export import export_run
from offtower.retrieval.export_options import ExportOptions
from offtower.retrieval.index import IndexOptions
from offtower.retrieval.propensity_sampler import PropensitySampler
from offtower.retrieval.quality import RetrievalQuality, retrieval_quality
from offtower.retrieval.results import SampleResult, SearchResult
from offtower.retrieval.retriever import Retriever
from offtower.retrieval.served_log import catalogue_section, decisions_table, served_schema

__all__ = [
    "ExportOptions",
    "IndexOptions",
    "ItemSample",
    "PropensitySampler",
    "RetrievalQuality",
    "Retriever",
    "SampleResult",
    "SearchResult",
    "catalogue_section",
    "decisions_table",
    "export_run",
    "retrieval_quality",
    "served_schema",
]
