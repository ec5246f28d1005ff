"""Several workers give the gradient of one over eligible items, in both strategies."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from offtower.config import SamplingConfig
from offtower.crossfit.reward_model import obtain_reward_model
from offtower.progress import Progress
from offtower.training.setup import build_setup
from offtower.training.workers import Workers
from tests.training.distributed.processes import of_each_size
from tests.training.distributed.test_gradients import first_batch, gradients
from tests.training.eligible_data import prepared
from tests.training.test_eligible_training import SETS, config_of

WORKERS = 3
STRATEGIES = ("replicated", "item_sharded")
PROPOSALS = ("uniform", "mixed", "top_k")
"""Of sampled terms, over the second set of forms."""


def all_cases(workers: Workers) -> dict[str, Any]:
    found = {}
    for forms in SETS:
        data, _ = prepared(120, *forms)
        model = obtain_reward_model(config_of("dr").reward_model, data, 0, Progress())
        for strategy in STRATEGIES:
            config = config_of("dr", strategy=strategy, batch_size=31)
            setup = build_setup(config, data, model, workers, Progress())
            found[f"{strategy} {' '.join(forms)}"] = gradients(setup, first_batch(setup))
    data, _ = prepared(120, *SETS[1])
    model = obtain_reward_model(config_of("dr").reward_model, data, 0, Progress())
    for proposal in PROPOSALS:
        for strategy in STRATEGIES:
            config = config_of("dr", strategy=strategy, batch_size=31, terms="sampled")
            config = replace(config, sampling=SamplingConfig(proposal, num_samples=20, top_k=6))
            setup = build_setup(config, data, model, workers, Progress())
            found[f"{strategy} {proposal}"] = gradients(setup, first_batch(setup))
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Any]:
    folder = tmp_path_factory.mktemp("eligible_gradients")
    of_each_size(WORKERS, all_cases, folder)
    return {
        (size, rank): torch.load(folder / f"{size}-{rank}.pt", weights_only=False)
        for size in range(1, WORKERS + 1)
        for rank in range(size)
    }


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", [*(" ".join(forms) for forms in SETS), *PROPOSALS])
def test_workers_give_the_gradient_of_one(
    results: dict[tuple[int, int], Any], strategy: str, case: str
) -> None:
    alone = results[1, 0][f"replicated {case}"]
    largest = max(float(one.abs().max()) for one in alone["gradients"].values())
    assert largest > 1e-4
    for size in range(1, WORKERS + 1):
        for rank in range(size):
            found = results[size, rank][f"{strategy} {case}"]
            assert found["value"] == pytest.approx(alone["value"], abs=1e-6)
            assert found["loss"] == pytest.approx(alone["loss"], abs=1e-6)
            assert found["measures"]["entropy"] == pytest.approx(
                alone["measures"]["entropy"], rel=1e-5
            )
            if rank == 0:
                for name, wanted in alone["gradients"].items():
                    error = float((found["gradients"][name] - wanted).abs().max())
                    assert error < 1e-5 * largest, name
