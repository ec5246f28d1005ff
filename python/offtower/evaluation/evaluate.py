"""Evaluate policies on the same rows: values, differences, diagnostics and verdicts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import numpy as np

from offtower.data.ledger import Ledger
from offtower.data.rounds import cut_before, key_starts
from offtower.errors import OfftowerError
from offtower.evaluation.decision.support import SupportDiagnostics, support_probe
from offtower.evaluation.estimators import Estimator, make_estimator, of_loggers
from offtower.evaluation.intervals.smoothing_bound import check_range
from offtower.evaluation.looks import CountedLook, LookRequest, identity
from offtower.evaluation.options import EvaluationOptions
from offtower.evaluation.result import EvaluationResult
from offtower.evaluation.rows import EvaluationRows
from offtower.evaluation.scoring.clock import check_times
from offtower.evaluation.sums import EvaluationSums
from offtower.mapping import merge_all

CHUNK_ROWS = 1 << 16


def evaluate_rows(
    rows_by_policy: Mapping[str, EvaluationRows],
    estimators: Iterable[Estimator | str] | None = None,
    *,
    reward_range: tuple[float, float],
    confidence: float = 0.95,
    intervals: Sequence[str] = ("auto", "normal", "bootstrap"),
    support: Mapping[str, Any] | None = None,
    ledger: Ledger | None = None,
    **options: Any,
) -> EvaluationResult:
    """Evaluate policies on the same logged rows.

    Args:
        rows_by_policy: per policy the rows as it sees them, in the same order.
        estimators: objects, or names that need no parameter; by default IPS and SNIPS, and DM and
            DR where every policy's rows have a reward model's terms (of slates DR alone, where they
            have the weights of earlier positions).
        support: by policy, the logging probabilities of items drawn from that policy
            (`support_probe`).
        ledger: of the rows (`offtower.data.ledger.Ledger`), which counts this look and the earlier
            ones at the same rewards; None counts none.
        options: the other fields of `EvaluationOptions`.

    Raises:
        OfftowerError: rows differ between policies, there are fewer than two rows, a column is
            missing, the log lacks support, or an option is wrong.
    """
    chosen = _estimators(rows_by_policy, estimators)
    try:
        settings = EvaluationOptions(
            chosen, check_range(reward_range), confidence, tuple(intervals), **options
        )
    except TypeError as error:
        raise OfftowerError(f"evaluate_rows: {error}") from None
    check_times(
        settings.time, has_times=all(one.time is not None for one in rows_by_policy.values())
    )
    probes = {
        name: probe if isinstance(probe, SupportDiagnostics) else support_probe(probe)
        for name, probe in (support or {}).items()
    }
    if ledger is None:
        return _evaluated(rows_by_policy, settings, probes)
    look = CountedLook(ledger, _look(rows_by_policy, settings))
    plan = look.plan()
    settings = replace(settings, verdict_confidences=tuple(plan.confidences.values()))
    return look.finish(plan, _evaluated(rows_by_policy, settings, probes))


def _evaluated(
    rows_by_policy: Mapping[str, EvaluationRows],
    options: EvaluationOptions,
    support: Mapping[str, SupportDiagnostics],
) -> EvaluationResult:
    shards = (EvaluationSums.of(shard, options) for shard in _shards(rows_by_policy))
    return merge_all(shards).finish(support)


def _look(rows_by_policy: Mapping[str, EvaluationRows], options: EvaluationOptions) -> LookRequest:
    """The look at these rows: their log is what no policy changes, a policy all the rest."""
    first = next(iter(rows_by_policy.values()), None)
    if first is None:
        raise OfftowerError("there is no policy to evaluate")
    logged = ("reward", "user", "round", "row_weight", "rewards")
    log = _digest(first, logged)
    columns = [field.name for field in fields(first) if field.name not in (*logged, "row", "time")]
    how = identity(repr(options))
    keys = {name: identity(_digest(rows, columns), how) for name, rows in rows_by_policy.items()}
    return LookRequest(log, keys, options.confidence, {})


def _digest(rows: EvaluationRows, columns: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for column in columns:
        value = getattr(rows, column)
        digest.update(f"{column} {value is not None};".encode())
        if value is not None:
            digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()[:32]


def _estimators(
    rows_by_policy: Mapping[str, EvaluationRows], given: Iterable[Estimator | str] | None
) -> tuple[Estimator, ...]:
    if given is None:
        modeled = all(
            rows.action_reward is not None and rows.expected_reward is not None
            for rows in rows_by_policy.values()
        )
        slates = any(rows.round is not None for rows in rows_by_policy.values())
        if slates:
            modeled = modeled and all(
                rows.earlier_weight is not None for rows in rows_by_policy.values()
            )
        direct = () if slates else ("dm",)
        given = ("ips", "snips", *direct, "dr") if modeled else ("ips", "snips")
    loggers = _loggers(rows_by_policy)
    return tuple(of_loggers(make_estimator(e), loggers) if isinstance(e, str) else e for e in given)


def _loggers(rows_by_policy: Mapping[str, EvaluationRows]) -> int:
    """Behavior policies that the rows name; 1 where they name none."""
    named = [rows.logger for rows in rows_by_policy.values() if rows.logger is not None]
    return 1 + max((int(one.max(initial=0)) for one in named), default=0)


def _shards(rows_by_policy: Mapping[str, EvaluationRows]) -> Iterator[dict[str, EvaluationRows]]:
    """Chunks of bounded size, with row keys."""
    sizes = {name: rows.n for name, rows in rows_by_policy.items()}
    if len(set(sizes.values())) > 1:
        raise OfftowerError(f"every policy needs the same rows; their numbers differ: {sizes}")
    n = next(iter(sizes.values()), 0)
    if rows_by_policy and n < 2:
        raise OfftowerError(f"an evaluation needs at least two rows; there are {n}")
    first = next(iter(rows_by_policy.values()), None)
    if first is None or first.round is None:
        edges = [*range(0, max(n, 1), CHUNK_ROWS), n]
    else:
        edges = cut_before(key_starts(first.round), CHUNK_ROWS)
    for start, stop in pairwise(edges):
        part = slice(start, stop)
        key = np.arange(part.start, part.stop, dtype=np.int64)
        yield {
            name: shard if shard.row is not None else replace(shard, row=key)
            for name, rows in rows_by_policy.items()
            for shard in (rows.take(part),)
        }
