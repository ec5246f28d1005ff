"""Estimates from the judged log itself: of missing propensities, and of its clusters'."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from offtower.data.catalogue import Catalogue
from offtower.data.encoding import FeatureEncoding
from offtower.data.log import ParquetLog
from offtower.data.reader import scan
from offtower.data.rows import EncodedRows
from offtower.errors import ConfigError
from offtower.evaluation.decision.propensity import EstimatedPropensities, estimate_propensities
from offtower.models.reward.dense import flatten
from offtower.progress import Progress

MAX_ROWS = 2_000_000
_SCAN_ROWS = 8192


@dataclass(frozen=True)
class LoggedProbability:
    """pi_0 of what was logged, estimated: `of` looks rows up by their number in the log."""

    row: NDArray[np.int64]
    found: EstimatedPropensities

    def of(self, rows: EncodedRows) -> NDArray[np.float64]:
        """(n,) of a batch."""
        return self.found.pscore[np.searchsorted(self.row, rows.row)]

    def filled(self, rows: EncodedRows) -> EncodedRows:
        """The batch with these as its propensities."""
        return replace(rows, pscore=self.of(rows))


def estimate_logged(
    log: ParquetLog,
    catalogue: Catalogue,
    encoding: FeatureEncoding,
    label: NDArray[np.int64] | None,
    seed: int,
    progress: Progress,
) -> LoggedProbability:
    """A calibrated model of the logging policy, cross-fitted on the log that is judged.

    label: (N,) cluster of each item, to estimate the clusters' probabilities; None for the items'.
    Raises ConfigError for a log of more than 2,000,000 rows (its contexts are held in memory), and
    OfftowerError for more than 5,000 items (`propensity.estimate_propensities`).
    """
    if log.num_rows > MAX_ROWS:
        raise ConfigError(
            f"propensities are estimated from up to {MAX_ROWS:,} rows, and this log has "
            f"{log.num_rows:,}; log them, or pass a part of the log with --log"
        )
    contexts, actions, users, rows = [], [], [], []
    progress.start("estimating propensities", None)
    for batch in scan(log, catalogue, encoding, _SCAN_ROWS):
        contexts.append(flatten(encoding, batch.context, len(batch), "log").astype(np.float32))
        actions.append(batch.action)
        rows.append(batch.row)
        if batch.user_id is not None:
            users.append(batch.user_id)
    action = np.concatenate(actions)
    found = estimate_propensities(
        np.concatenate(contexts),
        action if label is None else label[action],
        catalogue.num_items if label is None else int(label.max()) + 1,
        user=np.concatenate(users) if users else None,
        seed=seed,
    )
    progress.finish()
    return LoggedProbability(np.concatenate(rows), found)


def propensity_note(found: EstimatedPropensities) -> str:
    """The loud words."""
    return (
        "THE PROPENSITIES ARE ESTIMATES, NOT LOGGED: every off-policy value here rests on them and "
        "no interval covers their error (held-out log loss "
        f"{found.log_loss:.3g} against {found.marginal_log_loss:.3g} for the items' frequencies; "
        f"mean of 1 / propensity over the number of items {found.mean_inverse:.3g}, 1 if true)"
    )
