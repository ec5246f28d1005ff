"""Rows that a learner's policy is evaluated on, and the verdict on rows that it was fitted on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from offtower.data.catalogue import Catalogue
from offtower.data.check import RowChecker
from offtower.data.encoding import to_tensors
from offtower.data.log import Log
from offtower.data.row_sketch import RowSketch
from offtower.data.rows import encode_rows
from offtower.errors import DataError
from offtower.evaluation import EvaluationRows
from offtower.evaluation.decision.gate import withhold
from offtower.evaluation.result import EvaluationResult
from offtower.evaluation.scoring.clock import LogClock
from offtower.learner.feedback import joined_table
from offtower.models.items import ItemEmbeddings
from offtower.serving import ServedPolicy


def weighted_rows(
    served: ServedPolicy, items: ItemEmbeddings, log: Log, catalogue: Catalogue
) -> EvaluationRows:
    """Weigh every row of a log with propensities by a served policy.

    Raises:
        DataError: a row is invalid.
    """
    table = RowChecker(log.schema, catalogue).check(joined_table(log), log.location(0), 0)
    rows = encode_rows(table, log.schema, catalogue, served.policy.context_encoding, 0)
    u = served.policy.embed_contexts(to_tensors(rows.context)).detach()
    allowed = None if rows.eligible is None else rows.eligible.on()
    terms = served.terms(u, items, torch.from_numpy(rows.action), eligible=allowed)
    assert rows.pscore is not None
    clock = LogClock.of(log)
    return EvaluationRows(
        importance_weight=None,  # type: ignore[arg-type]
        reward=rows.reward.astype(np.float64),
        user=None if rows.user_id is None else rows.user_id.view(np.int64),
        log_weight=terms.log_prob.double().numpy() - np.log(rows.pscore),
        time=None if clock is None else clock.time(rows.timestamp),
    )


def microseconds(time: Any) -> NDArray[np.int64]:
    """Times of rows as whole numbers: microseconds since 1970 of dates.

    Raises:
        DataError: they are neither dates nor whole numbers.
    """
    values = np.asarray(time)
    if values.dtype.kind == "M":
        if np.isnat(values).any():
            raise DataError("time has missing values: give every row the time of its logging")
        return values.astype("datetime64[us]").astype(np.int64)
    if values.dtype.kind not in "iu":
        raise DataError(
            f"time must hold dates (datetime64) or whole numbers, but is an array of {values.dtype}"
        )
    return values.astype(np.int64)


def identified(log: Log) -> dict[str, Any]:
    """Fingerprint and sketch of a log's rows, for JSON."""
    rows = RowSketch.of(log.tables(), log.schema)
    return {"fingerprint": log.fingerprint, "rows": rows.to_dict()}


def holds_rows_of(log: Log, known: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a log is, or shares rows with, one of those that `identified` made."""
    if any(one["fingerprint"] == log.fingerprint for one in known):
        return True
    rows = RowSketch.of(log.tables(), log.schema)
    sketches = [RowSketch.from_dict(one["rows"]) for one in known]
    return any(one is not None and rows.shared(one) is not None for one in sketches)


def without_go(result: EvaluationResult) -> EvaluationResult:
    """Withhold the verdict on rows that the learner was fitted on."""
    evaluated = result.policies["learner"]
    verdict = withhold(
        evaluated.verdict,
        "these rows, or some of them, fitted the learner or chose its epoch, so that its value "
        "here is too high and no 'go' would mean anything. Decide on rows that fit did not see",
    )
    return replace(result, policies={"learner": replace(evaluated, verdict=verdict)})
