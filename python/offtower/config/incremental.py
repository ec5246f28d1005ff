"""Configuration of a run that continues from the policy of an earlier one."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from offtower.config.strict import STRICT


@dataclass(config=STRICT)
class ReplayConfig:
    """Rows of older logs that are trained on beside those of `data.train`."""

    logs: tuple[str, ...] = ()
    """Directories of older logs, or their addresses, with the columns of data.train. Their rows
    keep their logged propensities; rows of items that have left the catalogue are left out."""
    share: float = Field(default=0.2, gt=0.0, lt=1.0)
    """Share of replayed rows among all rows of training, drawn with the run's seed; all older rows
    where there are fewer."""


@dataclass(config=STRICT)
class IncrementalConfig:
    """Training that goes on from an earlier run, as `offtower train --from` sets it up
    (docs/how-to/train-daily.md)."""

    from_run: str | None = None
    """Folder of a finished run (`--from`). Its encodings are extended instead of fitted, and its
    weights and optimizer state are mapped to them row by row."""
    min_count: int | None = Field(default=None, ge=1)
    """Rows of the log that hold a new value before it gets an embedding of its own, counted over
    the runs that follow one another; null is each feature's own `min_count`. Items get theirs with
    the catalogue."""
    evict_after: int | None = Field(default=30, ge=1)
    """A value that this many runs after another have not seen loses its embedding; null keeps all.
    Items lose theirs with the catalogue."""
    moving: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Weight of the new log and catalogue in the means and variances that standardize numbers and
    vectors; 0 leaves them as they were first fitted."""
    new_rows: Literal["features", "unknown"] = "features"
    """Initial embedding of a new item's id. features: a ridge regression of the known ids'
    embeddings on the items' other features; unknown: that of the unknown value, as for other
    features."""
    optimizer_state: bool = True
    """Go on with the optimizer's state of the earlier run's newest checkpoint."""
    max_growth: float = Field(default=2.0, gt=0.0, allow_inf_nan=False)
    """Refuse a log or catalogue with more new values of a feature than this multiple of the known
    ones; a hundred are always accepted."""
    max_removed: float = Field(default=0.3, ge=0.0, le=1.0)
    """Refuse a catalogue that lacks more than this share of the earlier run's items."""
    replay: ReplayConfig = field(default_factory=ReplayConfig)
