"""The join of one partition in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from offtower.data.join.keys import find_keys
from offtower.data.join.plan import JoinCounts, JoinedReward, JoinPlan
from offtower.data.outcomes import NULL_TIME
from offtower.errors import DataError

_EXAMPLES = 3


def join_partition(
    decisions: NDArray[Any], outcomes: NDArray[Any], plan: JoinPlan, rewards: NDArray[np.float64]
) -> JoinCounts:
    """Fill the rewards of one partition's decisions."""
    order = np.lexsort((decisions["key"][:, 1], decisions["key"][:, 0]))
    decisions = decisions[order]
    same = (decisions["key"][1:] == decisions["key"][:-1]).all(axis=1)
    if same.any():
        at = int(same.argmax())
        one, other = sorted((decisions["row"][at], decisions["row"][at + 1]))
        names = ", ".join(name for name, _ in plan.keys)
        raise DataError(
            f"decisions {one} and {other} have the same key ({names}), and {int(same.sum()):,} "
            "rows of this kind were found in a part of them: an outcome would belong to both. "
            "Name key columns that are unique to a decision, or remove the repeated rows"
        )
    outcomes = outcomes[np.argsort(outcomes["order"], kind="stable")]
    match = find_keys(decisions["key"], outcomes["key"])
    unmatched = int((match < 0).sum())
    outcomes, match = outcomes[match >= 0], match[match >= 0]
    early = late = np.zeros(len(outcomes), dtype=bool)
    if plan.came is not None and plan.decided is not None:
        decided, came = decisions["time"][match], outcomes["time"]
        timed = (decided != NULL_TIME) & (came != NULL_TIME)
        early = timed & (came < decided)
        if plan.window is not None:
            late = timed & ~early & (came - decided > outcomes["limit"])
            if not timed.all():
                raise DataError(
                    f"{int((~timed).sum()):,} outcomes or their decisions have no time, which a "
                    "window needs"
                )
    kept = ~(early | late)
    outcomes, match = outcomes[kept], match[kept]
    order = np.lexsort((outcomes["order"], outcomes["time"], match))
    outcomes, match = outcomes[order], match[order]
    repeated = _repeats(match, outcomes["whole"])
    _check_duplicates(repeated, outcomes, plan)
    duplicates = int(repeated.sum())
    if plan.duplicates == "drop":
        outcomes, match = outcomes[~repeated], match[~repeated]
    each = np.bincount(match, minlength=len(decisions))
    for index, reward in enumerate(plan.rewards):
        group, value = _combined(match, outcomes["value"][:, index], reward, decisions, plan)
        rewards[index, decisions["row"][group]] = value
    return JoinCounts(
        rewarded=int((each > 0).sum()),
        several=int((each > 1).sum()),
        unmatched=unmatched,
        early=int(early.sum()),
        late=int(late.sum()),
        duplicates=duplicates,
    )


def _combined(
    match: NDArray[np.int64],
    value: NDArray[np.float64],
    reward: JoinedReward,
    decisions: NDArray[Any],
    plan: JoinPlan,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return decisions (by index) with a value, and their values by the rule."""
    known = ~np.isnan(value)
    match, value = match[known], value[known]
    first = np.flatnonzero(np.diff(match, prepend=-1))
    group = match[first]
    if reward.rule is None and len(first) < len(match):
        several = np.flatnonzero(np.diff(np.append(first, len(match))) > 1)
        example = decisions["row"][group[several[:_EXAMPLES]]].tolist()
        raise DataError(
            f"decisions have several outcomes with a '{reward.name}' (for example decision "
            f"{', '.join(map(str, example))}, counted from 0): state how they become one reward "
            "with --rule sum, max, first or any"
        )
    if not len(first):
        return group, value
    if reward.rule == "sum":
        return group, np.add.reduceat(value, first)
    if reward.rule == "max":
        return group, np.maximum.reduceat(value, first)
    if reward.rule == "any":
        return group, np.logical_or.reduceat(value != 0.0, first).astype(np.float64)
    return group, value[first]


def _check_duplicates(repeated: NDArray[np.bool_], outcomes: NDArray[Any], plan: JoinPlan) -> None:
    if plan.duplicates != "error" or not repeated.any():
        return
    if all(reward.rule in ("max", "first", "any") for reward in plan.rewards):
        return  # A repeated outcome changes nothing.
    rows = outcomes["order"][repeated][:_EXAMPLES].tolist()
    raise DataError(
        f"outcomes equal an earlier one in every column (for example outcome "
        f"{', '.join(map(str, rows))}, counted from 0): replayed events would count twice. Drop "
        "them with --duplicates drop, or count them with --duplicates keep"
    )


def _repeats(match: NDArray[np.int64], whole: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """(n,) mask of rows that equal an earlier one; rows are sorted by decision."""
    order = np.lexsort((np.arange(len(match)), whole, match))
    same = (match[order][1:] == match[order][:-1]) & (whole[order][1:] == whole[order][:-1])
    found = np.zeros(len(match), dtype=bool)
    found[order[1:][same]] = True
    return found
