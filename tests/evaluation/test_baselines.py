"""Baseline policies, against sums over the rows of the logs as they stand in the tables."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from offtower.data.catalogue import Catalogue
from offtower.data.log import ParquetLog
from offtower.data.reader import scan
from offtower.evaluation.baselines import (
    MOST_REWARDED,
    UNIFORM,
    Baselines,
    _RewardSums,
    baseline_values,
    shown_items,
)
from offtower.evaluation.estimators import make_estimator
from offtower.evaluation.options import EvaluationOptions
from offtower.evaluation.sums import EvaluationSums
from offtower.progress import Progress
from tests.evaluation.test_runs import ITEMS, evaluate, place
from tests.training.eligible_data import N, prepared

__all__ = ["place"]


def table(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """(action numbers, rewards, propensities, segment) of a log, from its tables."""
    log = ParquetLog.open(folder)
    catalogue = Catalogue.open(folder.parent / "catalogue")
    rows = log.read_row_group(0) if len(log.row_group_sizes) == 1 else None
    assert rows is not None, "these logs have one row group"
    segment = next(spec.source for spec in log.schema.context if spec.kind == "category")
    return (
        catalogue.index_of(rows.column("action")),
        rows.column("reward").to_numpy().astype(float),
        rows.column("pscore").to_numpy(),
        rows.column(segment).to_pylist(),
    )


def self_normalized(weight: np.ndarray, reward: np.ndarray) -> float:
    return float((weight * reward).sum() / weight.sum())


def test_values_are_weighted_means_over_the_matching_rows(place: Path) -> None:
    found = evaluate(place).baseline_values
    action, reward, _, segment = table(place / "train")
    total = np.bincount(action, weights=reward, minlength=ITEMS)
    best = int(total.argmax())
    by_segment: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(ITEMS))
    for one, item, value in zip(segment, action, reward, strict=True):
        by_segment[one][item] += value
    action, reward, pscore, segment = table(place / "test")
    assert found[UNIFORM].estimate.value == pytest.approx(
        self_normalized(1.0 / pscore, reward), rel=1e-9
    )
    weight = (action == best) / pscore
    assert found[MOST_REWARDED].estimate.value == pytest.approx(
        self_normalized(weight, reward), rel=1e-9
    )
    name = next(one for one in found if " by " in one)
    shown = np.array([by_segment[one].argmax() for one in segment])
    assert found[name].estimate.value == pytest.approx(
        self_normalized((action == shown) / pscore, reward), rel=1e-9
    )
    assert all(one.interval.low < one.estimate.value < one.interval.high for one in found.values())


def test_uniform_counts_eligible_items_and_lists_pass_over_the_others() -> None:
    data, sets = prepared(150, "attribute", "exclude")
    rows = next(iter(data.scan(4096)))
    order = np.random.default_rng(0).permutation(N)
    found = Baselines(N, order.astype(np.int64)).rows(rows)
    assert rows.pscore is not None
    np.testing.assert_allclose(
        found[UNIFORM].importance_weight, 1.0 / sets.sum(axis=1) / rows.pscore, rtol=1e-9
    )
    shown = np.array([next(item for item in order if one[item]) for one in sets])
    np.testing.assert_array_equal(shown_items(rows, order.astype(np.int64)), shown)
    np.testing.assert_allclose(
        found[MOST_REWARDED].importance_weight, (rows.action == shown) / rows.pscore, rtol=1e-9
    )


def test_positions_read_down_the_list(place: Path) -> None:
    from dataclasses import replace

    log, catalogue = ParquetLog.open(place / "test"), Catalogue.open(place / "catalogue")
    encoding = evaluate_encoding(place)
    rows = next(iter(scan(log, catalogue, encoding, 64)))
    best = np.array([4, 0, 2], dtype=np.int64)
    position = np.arange(len(rows)) % 5
    shown = shown_items(replace(rows, position=position), best)
    np.testing.assert_array_equal(shown, np.array([4, 0, 2, -1, -1])[position])


def evaluate_encoding(place: Path):  # type: ignore[no-untyped-def]
    from offtower.evaluation.run_loading import open_run

    return open_run(
        place / "runs" / "a", Catalogue.open(place / "catalogue")
    ).policy.context_encoding


def test_a_baseline_that_the_log_hardly_shows_has_no_value() -> None:
    data, _ = prepared(60, "attribute")
    rows = next(iter(data.scan(4096)))
    never = np.setdiff1d(np.arange(N), rows.action)[:1].astype(np.int64)
    assert never.size, "some item is never logged"
    options = EvaluationOptions((make_estimator("snips"),), (0.0, 1.0), intervals=("normal",))
    baselines = Baselines(N, never).rows(rows)
    values, notes = baseline_values(EvaluationSums.of(baselines, options))
    assert list(values) == [UNIFORM]
    assert len(notes) == 1 and MOST_REWARDED in notes[0]


def test_sums_of_rewards_merge_over_batches() -> None:
    rng = np.random.default_rng(2)
    segment, item = rng.integers(0, 3, 5000), rng.integers(0, 50, 5000)
    reward = rng.integers(0, 9, 5000) * 1.0
    sums = _RewardSums(50)
    for part in np.array_split(np.arange(5000), 7):
        sums.add(segment[part], item[part], reward[part])
    found = dict(sums.best(4))
    for one in range(3):
        own = segment == one
        total = np.bincount(item[own], weights=reward[own], minlength=50)
        expected = np.argsort(-total, kind="stable")[:4]
        np.testing.assert_array_equal(found[one], expected)


def test_a_training_log_that_is_gone_leaves_uniform(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "train").rename(place / "moved")
    try:
        found = evaluate(place, "estimators=[{name: snips}]")
    finally:
        (place / "moved").rename(place / "train")
    assert list(found.baseline_values) == [UNIFORM]
    assert any("most rewarded items are missing" in note for note in found.notes)


def test_fitting_reads_a_bounded_number_of_rows(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from offtower.evaluation.baselines import _spread

    sizes = np.full(1000, 10)
    groups = _spread(sizes, 95)
    assert sizes[groups].sum() <= 95 and groups[0] == 0 and groups[-1] == 999
    np.testing.assert_array_equal(_spread(sizes, 10_000), np.arange(1000))
    log, catalogue = ParquetLog.open(place / "train"), Catalogue.open(place / "catalogue")
    fitted = Baselines.fit(log, catalogue, evaluate_encoding(place), Progress())
    assert fitted.most_rewarded.size <= ITEMS
