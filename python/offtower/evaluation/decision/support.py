"""Items of the target policy that the log does not support."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import betaincinv

from offtower.errors import DataError


@dataclass(frozen=True)
class SupportDiagnostics:
    """Items drawn from the target policy that the logging policy does not show.

    Attributes:
        draws: number of items. missing: share with logging probability 0.
        low, high: Clopper-Pearson interval of that share, at 95 %.
        least: least positive logging probability among the draws; None where all are 0.
        hidden: share with logging probability below target probability / rows, including 0; None
            where unknown. Their weight exceeds the number of rows, so the log is expected to hold
            less than one row of this whole share of the target.
    """

    draws: int
    missing: float
    low: float
    high: float
    least: float | None
    hidden: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def support_probe(
    logging_probability: ArrayLike,
    target_probability: ArrayLike | None = None,
    *,
    num_rows: int | None = None,
) -> SupportDiagnostics:
    """Share of the target policy without support in the log.

    The expected number of the log's n rows in the set S = {(x, a): pi_0(a|x) < pi_e(a|x) / n} is
    n sum_S pi_0 < pi_e(S), below 1 and below the share itself.

    Args:
        logging_probability: (m,) pi_0(a|x) of items a drawn from pi_e(.|x) in contexts x of the
            log.
        target_probability: (m,) pi_e(a|x) of them, for `hidden`. num_rows: n of the log, likewise.

    Raises:
        DataError: an empty array, numbers that are no probabilities, other shapes.
    """
    p = np.asarray(logging_probability, dtype=np.float64).ravel()
    if p.size == 0:
        raise DataError("a support probe needs at least one item drawn from the target policy")
    if not ((p >= 0.0) & (p <= 1.0 + 1e-9)).all():
        raise DataError("a support probe needs logging probabilities, numbers from 0 to 1")
    missing = int(np.count_nonzero(p == 0.0))
    low = float(betaincinv(missing, p.size - missing + 1, 0.025)) if missing else 0.0
    high = float(betaincinv(missing + 1, p.size - missing, 0.975)) if missing < p.size else 1.0
    positive = p[p > 0.0]
    least = float(positive.min()) if positive.size else None
    hidden = None
    if target_probability is not None and num_rows is not None:
        target = np.asarray(target_probability, dtype=np.float64).ravel()
        if target.shape != p.shape or not ((target > 0.0) & (target <= 1.0 + 1e-9)).all():
            raise DataError(
                f"a support probe needs target probabilities above 0 of the same {p.size} items"
            )
        hidden = float(np.mean(p < target / num_rows))
    return SupportDiagnostics(p.size, missing / p.size, low, high, least, hidden)
