"""Values that an evaluation estimates from simulated logs, against the simulator's truth.

The truth is that of the served policy in the contexts of the log, by enumeration of all slates.
Each comparison is within 4.5 standard errors (false alarm 7e-6).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from offtower.config import ServingConfig
from offtower.data import ParquetLog, write_log
from offtower.data.simulate import (
    EligibilitySettings,
    ServedDistribution,
    SlateSettings,
    slate_value,
)
from tests.roundtrip.loop import Loop

ROUNDS, K = 1200, 3
FORMS = [None, EligibilitySettings(regions=3, days=15, seen=3)]


@pytest.mark.parametrize("eligible", FORMS, ids=["all items", "eligible items"])
def test_estimates_of_slates_meet_the_truth(
    tmp_path: Path, eligible: EligibilitySettings | None
) -> None:
    loop = Loop.make(tmp_path, 8, eligible, SlateSettings(K, "cascade", interaction=0.8))
    world, log = loop.world, tmp_path / "log"
    write_log(log, world.log(ROUNDS, seed=5), world.log_schema)
    rows = pa.concat_tables(ParquetLog.open(log).tables())
    contexts = rows.take(pa.array(np.arange(0, ROUNDS * K, K)))
    items = torch.from_numpy(np.array(loop.retriever.vectors))
    for serving in (
        ServingConfig(k=K, temperature=8.0),
        ServingConfig(k=K, temperature=4.0, uniform=0.3),
        ServingConfig(k=K, temperature=8.0, top=5, uniform=0.1),
    ):
        policy = world.two_tower(
            lambda chunk: torch.from_numpy(loop.retriever.embed(chunk)),
            items,
            served=ServedDistribution(serving.temperature, serving.uniform, serving.top),
        )
        truth = slate_value(world, policy, contexts)
        found = loop.evaluate(log, serving, K)
        by_round = (found.weight * found.rewards).sum(axis=1)
        error = by_round.std() / ROUNDS**0.5
        assert truth.exact and error < 0.1 * truth.value
        assert found.values["ips"] == pytest.approx(by_round.mean(), rel=1e-9)
        assert abs(by_round.mean() - truth.value) < 4.5 * error
        mean = found.weight.mean(axis=0)
        assert (np.abs(mean - 1.0) < 4.5 * found.weight.std(axis=0) / ROUNDS**0.5).all()
