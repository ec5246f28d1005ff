"""Rewarded rows of a log, and the largest weight 1 / pscore that candidates of `auto` use."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from offtower.config import parse_config
from offtower.data.catalogue import Catalogue
from offtower.data.log import TableLog
from offtower.data.schema import CatalogueSchema, FeatureSpec, LogSchema
from offtower.objectives import ImplicitSquares, WeightedLikelihood
from offtower.prepare import PreparedData, prepare
from offtower.progress import Progress
from offtower.training.auto.candidates import make_candidates
from offtower.training.auto.rewarded_rows import RewardedRows


def sample(action: list[int], inverse: list[float]) -> RewardedRows:
    return RewardedRows(np.array(action), np.array(inverse), np.bincount(action).astype(float))


def test_the_limit_leaves_the_share_of_effective_rows() -> None:
    """Half of the rows have weight 1, half a huge one: (1 + c)^2 = 2 share (1 + c^2)."""
    rows = sample([0] * 10, [1.0] * 5 + [1e6] * 5)
    for per_item in (False, True):
        assert rows.max_weight(0.75, per_item=per_item) == pytest.approx(2.0 + 3.0**0.5)
    assert rows.mean_weight(3.0) == pytest.approx(2.0)


def test_weights_that_differ_between_items_only_are_not_clipped() -> None:
    rows = sample([0] * 5 + [1] * 5, [1.0] * 5 + [1e6] * 5)
    assert rows.max_weight(0.75, per_item=True) == 1e6
    assert rows.max_weight(0.75, per_item=False) == pytest.approx(2.0 + 3.0**0.5)


def popularity_log(described: bool) -> PreparedData:
    """500 rows of 200 items that are shown by their popularity, whatever the context."""
    rng = np.random.default_rng(0)
    shown = 1.0 / np.arange(1, 201)
    shown /= shown.sum()
    action = rng.choice(200, 500, p=shown)
    columns = {"user": rng.integers(0, 30, 500), "action": action, "pscore": shown[action]}
    table = pa.table({**columns, "reward": (np.arange(500) % 4 == 0).astype(float)})
    context = (FeatureSpec(name="user", kind="category"),)
    features: tuple[FeatureSpec, ...] = (FeatureSpec(name="item_id", kind="category"),)
    if described:
        features = (*features, FeatureSpec(name="size", kind="numeric"))
    items = pa.table({"item_id": np.arange(200), "size": rng.standard_normal(200)})
    schema = CatalogueSchema(item_id="item_id", features=features)
    return prepare(
        TableLog(table, LogSchema(context=context, pscore="pscore")),
        None,
        Catalogue.from_table(items, schema),
        Progress(),
    )


def test_candidates_correct_for_popularity_in_full() -> None:
    data = popularity_log(described=False)
    config = parse_config({"name": "x", "data": {"train": "m", "catalogue": "m"}})
    rows = RewardedRows.of(data)
    assert len(rows.action) == 125 and rows.counts.sum() == pytest.approx(125)
    largest = rows.inverse_pscore.max()
    assert largest > 200
    objectives = {one.name: one.objective for one in make_candidates(config, data)}
    likelihood, implicit = objectives["likelihood_linear"], objectives["implicit_linear"]
    assert isinstance(likelihood, WeightedLikelihood) and isinstance(implicit, ImplicitSquares)
    assert likelihood.max_weight == implicit.max_weight == pytest.approx(largest)
    # All items together weigh a fixed share of the rewarded ones, whatever the scale of 1 / pscore.
    assert implicit.alpha == pytest.approx(0.04 * rows.inverse_pscore.mean())


def test_features_share_rows_between_items() -> None:
    """Rare items' weights then add variance to all others, so that they are limited together."""
    data = popularity_log(described=True)
    config = parse_config({"name": "x", "data": {"train": "m", "catalogue": "m"}})
    candidates = make_candidates(config, data)
    assert [one.name for one in candidates] == [
        "regression_linear",
        "regression",
        "likelihood_linear",
        "likelihood",
        "behavior_cloning",
    ]
    objective = candidates[2].objective
    assert isinstance(objective, WeightedLikelihood)
    limit = RewardedRows.of(data).max_weight(0.5, per_item=False)
    assert objective.max_weight == max(100.0, limit)
