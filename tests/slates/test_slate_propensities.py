"""Estimated propensities of slates: a model of position 0, and conditionals from it."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from offtower.data import Catalogue, CatalogueSchema, FeatureSpec, LogSchema, write_log
from offtower.data.encoding import FeatureEncoding
from offtower.data.log import ParquetLog
from offtower.data.reader import scan
from offtower.evaluation.scoring.propensities import estimate_logged
from offtower.progress import Progress

from .worlds import ITEMS, POSITIONS, SLATES, conditionals, softmax


@pytest.mark.parametrize("kind", ["conditional", "slate"])
def test_a_policy_without_context_is_recovered(tmp_path, kind) -> None:
    rng = np.random.default_rng(0)
    p = softmax(np.array([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.0]))
    truth = conditionals(p)
    rounds = 4000
    slate = rng.choice(len(SLATES), size=rounds, p=truth.prod(axis=1))
    table = pa.table(
        {
            "x": np.repeat(rng.normal(size=rounds), POSITIONS),
            "action": SLATES[slate].reshape(-1),
            "reward": np.zeros(rounds * POSITIONS),
            "round": np.repeat(np.arange(rounds), POSITIONS),
            "position": np.tile(np.arange(POSITIONS), rounds),
        }
    )
    schema = LogSchema(
        context=(FeatureSpec(name="x", kind="numeric"),),
        pscore=None,
        position="position",
        round_id="round",
        pscore_kind=kind,
    )
    write_log(tmp_path / "log", [table], schema)
    log = ParquetLog.open(tmp_path / "log")
    catalogue = Catalogue(pa.table({"item_id": np.arange(ITEMS)}), CatalogueSchema())
    encoding = FeatureEncoding.fit(schema.context, log.tables())
    found = estimate_logged(log, catalogue, encoding, None, 0, Progress())
    (rows,) = scan(log, catalogue, encoding, 100_000)
    filled = found.filled(rows).pscore.reshape(-1, POSITIONS)
    expected = truth[slate]
    if kind == "slate":
        expected = np.repeat(expected.prod(axis=1, keepdims=True), POSITIONS, axis=1)
    # A share of 3 % of 4,000 rounds has a relative error of .09; a fit on all positions would be
    # off by factors of 2.
    ratio = np.log(filled / expected)
    assert np.abs(ratio.mean(axis=0)).max() < 0.1
    assert np.abs(ratio).mean() < 0.15
