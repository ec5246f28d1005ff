"""Options of an export."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from offtower.errors import ConfigError
from offtower.retrieval.index import IndexOptions
from offtower.retrieval.parquet_parts import Layout
from offtower.retrieval.vectors import Dtype


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export.

    Attributes:
        dtype: dtype of the item vectors; the recall of float16 and int8 is measured.
        index: index to build; None searches exactly. "auto" builds ivf_flat if FAISS is installed
            and the catalogue has more than 20,000 items.
        sampling: write the cells for draws with propensities (one more float32 copy of the items).
        parquet: write Parquet parts.
        layout: "offtower" has columns item_id and embedding; "vector_db" id, values, metadata.
        fixed_size: fixed-size lists in the Parquet parts; plain lists otherwise.
        onnx: True requires ONNX; None writes it if its packages are installed.
        contexts: number of contexts for measuring recall and tuning the index.
        num_cells: cells for sampling; None derives the number from that of the items.
        kept: number of newest versions to keep.
        keep_seconds: time for which a replaced version is kept beyond that number, so that
            processes that are opening it can finish.
        rebuild_index: cluster the items anew. Otherwise an ivf_* index takes over the clusters of
            the run's current export, or of that of the run it goes on from, until its recall falls
            below the target (`retrieval.index_update`).
        chunk: items embedded at a time.
        seed: seed of the index, the cells and the choice of contexts.
    """

    dtype: Dtype = "float32"
    index: IndexOptions | Literal["auto"] | None = "auto"
    sampling: bool = True
    parquet: bool = True
    layout: Layout = "offtower"
    fixed_size: bool = True
    onnx: bool | None = None
    contexts: int = 1000
    num_cells: int | None = None
    kept: int = 2
    keep_seconds: float = 600.0
    rebuild_index: bool = False
    chunk: int = 65_536
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "float16", "int8"):
            raise ConfigError(f"dtype must be float32, float16 or int8, got '{self.dtype}'")
        if self.layout not in ("offtower", "vector_db"):
            raise ConfigError(f"layout must be offtower or vector_db, got '{self.layout}'")
        for name in ("contexts", "kept", "chunk"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.keep_seconds >= 0.0:
            raise ConfigError(f"keep_seconds must not be negative, got {self.keep_seconds}")
