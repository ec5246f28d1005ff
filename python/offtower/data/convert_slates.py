"""Conversion from and to the slate dict of Open Bandit Pipeline (OBP)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from offtower.data.catalogue import Catalogue
from offtower.data.convert import from_bandit_feedback, to_bandit_feedback
from offtower.data.log import Log, TableLog
from offtower.data.rounds import Rounds
from offtower.data.schema import LogSchema, PscoreKind
from offtower.errors import DataError

_EXTRA = ("pscore_item_position", "expected_reward_factual")
"""Further columns of OBP's dict, kept beside those of the schema."""
_TOLERANCE = 1e-6
"""Relative distance of products of propensities from the slate's."""


def from_slate_feedback(
    feedback: Mapping[str, Any],
    context_name: str = "context",
    reward_range: tuple[float, float] | None = None,
) -> tuple[TableLog, Catalogue]:
    """Convert OBP's slate dict to a log in memory and a catalogue of the actions 0 .. n - 1.

    With `pscore_cascade` the log's propensities are conditional, pi_0(a_k|x, a_1..a_{k-1}); with
    `pscore` alone they are those of whole slates; with `pscore_item_position` alone marginal.

    Args:
        feedback: `context` (n_rounds, d), `action_context` (n_unique_action, k), `slate_id`,
            `action`, `position` and `reward`, each (rows,), in the order of rounds and positions,
            and one of the propensities above, (rows,).
        context_name: name of the log's only feature, a vector.
        reward_range: as in `from_bandit_feedback`.

    Raises:
        DataError: a key is missing or an array has another shape, positions of a slate are not 0,
            1, 2, ..., or the propensities of a slate do not multiply to its own.
    """
    slate = _rows(feedback, "slate_id", None)
    n = len(slate)
    rounds = Rounds.of(slate, _rows(feedback, "position", n))
    context = np.asarray(feedback["context"])
    if len(context) != len(rounds):
        raise DataError(f"{len(rounds)} slates, but context has {len(context)} rows")
    kind, pscore = _propensities(feedback, rounds)
    single = {
        **{key: _rows(feedback, key, n) for key in ("action", "reward")},
        "context": np.repeat(context, rounds.lengths, axis=0),
        "action_context": feedback["action_context"],
        "position": rounds.position,
        "pscore": pscore,
    }
    log, catalogue = from_bandit_feedback(single, context_name, reward_range)
    table = log.table.append_column("slate_id", pa.array(slate))
    for key in _EXTRA:
        if feedback.get(key) is not None:
            table = table.append_column(key, pa.array(_rows(feedback, key, n)))
    schema = LogSchema(
        context=log.schema.context,
        pscore="pscore",
        position="position",
        pscore_kind=kind,
        round_id="slate_id",
        reward_range=log.schema.reward_range,
    )
    return TableLog(table, schema), catalogue


def to_slate_feedback(log: Log, catalogue: Catalogue) -> dict[str, Any]:
    """Convert a log of slates that fits into memory to OBP's slate dict.

    Returns:
        n_rounds, n_unique_action, slate_id, context (n_rounds, d), action_context, action,
        position, reward, pscore of the slate, and for conditional propensities pscore_cascade;
        pscore_item_position and expected_reward_factual where a log in memory has them, else None
        and left out.

    Raises:
        DataError: the log has no slates, or slates of different lengths.
    """
    schema = log.schema
    if not schema.slates:
        raise DataError("the log has no slates: its pscore_kind is not conditional or slate")
    feedback = to_bandit_feedback(log, catalogue)
    rounds = Rounds.of_positions(feedback["position"])
    if (rounds.lengths != rounds.longest).any():
        raise DataError("OBP's slates have equal lengths, and this log's have not")
    pscore = feedback["pscore"]
    made: dict[str, Any] = {
        "n_rounds": len(rounds),
        "n_unique_action": feedback["n_actions"],
        "slate_id": rounds.number,
        "context": feedback["context"][rounds.first],
        **{key: feedback[key] for key in ("action_context", "action", "position", "reward")},
        "pscore": pscore,
        "pscore_item_position": None,
    }
    if schema.pscore_kind == "conditional":
        cascade = pscore.reshape(-1, rounds.longest).cumprod(axis=1)
        made["pscore_cascade"] = cascade.reshape(-1)
        made["pscore"] = np.repeat(cascade[:, -1], rounds.longest)
    if isinstance(log, TableLog):
        for key in _EXTRA:
            if key in log.table.column_names:
                made[key] = log.table.column(key).to_numpy()
    return made


def _propensities(
    feedback: Mapping[str, Any], rounds: Rounds
) -> tuple[PscoreKind, NDArray[np.float64]]:
    n = rounds.num_rows
    found = {
        key: _rows(feedback, key, n).astype(np.float64)
        for key in ("pscore_cascade", "pscore", "pscore_item_position")
        if feedback.get(key) is not None
    }
    cascade, slate = found.get("pscore_cascade"), found.get("pscore")
    if slate is not None:
        _check_equal(slate, np.repeat(slate[rounds.first], rounds.lengths), "pscore")
    if cascade is not None:
        if slate is not None:
            last = np.repeat(cascade[rounds.offsets[1:] - 1], rounds.lengths)
            _check_equal(slate, last, "pscore_cascade")
        above = np.where(rounds.position == 0, 1.0, np.concatenate([[1.0], cascade[:-1]]))
        return "conditional", cascade / above
    if slate is not None:
        return "slate", slate
    if "pscore_item_position" in found:
        return "marginal", found["pscore_item_position"]
    raise DataError("the slates have no pscore, pscore_cascade or pscore_item_position")


def _check_equal(slate: NDArray[np.float64], other: NDArray[np.float64], name: str) -> None:
    wrong = np.abs(other - slate) > _TOLERANCE * slate
    if wrong.any():
        row = int(np.argmax(wrong))
        raise DataError(
            f"row {row}: the slate's pscore is {slate[row]:.6g}, but '{name}' gives "
            f"{other[row]:.6g} for the whole slate; they must be equal"
        )


def _rows(feedback: Mapping[str, Any], key: str, n: int | None) -> NDArray[Any]:
    if feedback.get(key) is None:
        raise DataError(f"the slate dict has no '{key}'; it has {', '.join(feedback)}")
    values = np.asarray(feedback[key])
    if values.ndim != 1 or (n is not None and len(values) != n):
        expected = "one number a row" if n is None else f"({n},)"
        raise DataError(f"'{key}' must have shape {expected}, but has {values.shape}")
    return values
