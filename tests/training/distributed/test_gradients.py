"""R workers give the gradient of one worker on the joined batch, in both strategies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from offtower.config import Config
from offtower.crossfit.reward_model import obtain_reward_model
from offtower.data.reader import Step
from offtower.models.policy import TwoTowerPolicy
from offtower.models.store import save_policy
from offtower.prepare import PreparedData, open_data
from offtower.progress import Progress
from offtower.training.distributed.item_shard import owned_weights, whole_policy
from offtower.training.epoch_metrics import diagnostics_line
from offtower.training.setup import TrainingSetup, build_setup
from offtower.training.step import StepKey
from offtower.training.workers import SINGLE_PROCESS, Workers
from tests.training.conftest import make_config
from tests.training.distributed.processes import of_each_size

WORKERS = 4
STRATEGIES = ("replicated", "item_sharded")
OBJECTIVES = ("ips", "snips", "dr", "clipped_dr", "regression", "weighted_likelihood")
CASES = [(name, 31) for name in OBJECTIVES] + [("snips", 3), ("dr", 2), ("regression", 1)]
CASES += [("behavior_cloning", 31)]
"""Objective and batch size: 31 and 3 are uneven for some number of workers, 2 and 1 leave workers
without rows."""
PAIRS = [(*case, strategy) for case in CASES for strategy in STRATEGIES]
PAIRS += [(name, size, "replicated") for name in ("implicit_squares", "potec") for size in (31, 2)]
"""Some need the whole catalogue on each worker."""
PROPOSALS = ("uniform", "mixed", "in_batch", "frequency", "top_k")
SAMPLED = [
    *((proposal, "ips", 31, 6) for proposal in PROPOSALS),
    *((proposal, "dr", 31, 6) for proposal in ("uniform", "mixed", "top_k")),
    ("in_batch", "in_batch_softmax", 3, 6),
    ("mixed", "mixed_negatives", 2, 6),
    ("top_k", "dr", 2, 1),
    ("uniform", "dr", 1, 1),
    ("mixed", "behavior_cloning", 31, 6),
]
"""Proposal, objective, batch size and draws. Few of each leave workers without any item."""
REFERENCE = [("ips", 31, "exact"), ("dr", 2, "exact"), ("ips", 31, "sampled")]
"""Objective, batch size and terms, with the exact KL to a stored reference policy."""


def config_of(
    folder: Path, runs: Path, strategy: str, objective: str, batch: int, *more: str
) -> Config:
    return make_config(
        folder,
        runs,
        f"{strategy}-{objective}-{batch}",
        f"training.strategy={strategy}",
        f"objective.name={objective}",
        f"training.batch_size={batch}",
        "training.item_chunk=3",
        "data.validation=null",
        "policy.item_bias=true",
        # potec has an inverse temperature instead.
        f"policy.learn_temperature={str(objective != 'potec').lower()}",
        "policy.item_tower.dropout=0.1",
        "policy.item_tower.bag=root",
        "reward_model.epochs=1",
        *more,
    )


def gradients(setup: TrainingSetup, batch: Step) -> dict[str, Any]:
    """Loss, value, measures, norm and the summed gradients of the whole policy, by name."""
    policy, workers = setup.policy, setup.step.workers
    policy.train()
    policy.seed_draws(11)
    trainer = setup.trainer()
    if setup.step.proposal is not None:
        setup.step.proposal.at_step(0)
    value, measures = setup.step.loss(batch, diagnose=True, key=StepKey(1, 5))
    value.loss.backward()
    trainer._gradients.combine()
    norm = float(trainer._gradients.clip(1e9))
    found: dict[str, Tensor] = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.to_dense().clone()
        for name, p in policy.named_parameters()
    }
    if setup.shard is not None:
        # Gradients in the places of the weights: the whole policy's assembly puts rows in order.
        policy.load_state_dict({**policy.state_dict(), **found})
        whole = whole_policy(policy, setup.shard, setup.data, workers)
        names = set(owned_weights(policy, setup.shard).values())
        found = {
            name: whole.state_dict()[name] if whole is not None and name in names else value
            for name, value in found.items()
        }
    if setup.step.proposal is not None:
        setup.step.proposal.close()
    return {
        "loss": float(setup.step.total_loss(value.loss.detach())),
        "value": float(value.value),
        "norm": norm,
        "measures": None if measures is None else diagnostics_line(measures),
        "gradients": found,
    }


def first_batch(setup: TrainingSetup) -> Step:
    trainer = setup.trainer()
    with trainer.reader() as reader:
        for batch in reader.epoch(0, None, setup.step.workers.rank, setup.step.workers.size):
            return batch
    raise AssertionError


def prepared(config: Config) -> tuple[PreparedData, Any]:
    data = open_data(config, Progress())
    return data, obtain_reward_model(config.reward_model, data, config.seed, Progress())


def all_cases(workers: Workers, folder: Path, runs: Path) -> dict[str, Any]:
    found = {}
    data, model = prepared(config_of(folder, runs, "replicated", "dr", 31))
    for objective, size, strategy in PAIRS:
        config = config_of(folder, runs, strategy, objective, size)
        setup = build_setup(config, data, model, workers, Progress())
        found[f"{strategy} {objective} {size}"] = gradients(setup, first_batch(setup))
    for proposal, objective, size, draws in SAMPLED:
        for strategy in STRATEGIES:
            more = sampling(proposal, draws)
            config = config_of(folder, runs, strategy, objective, size, *more)
            setup = build_setup(config, data, model, workers, Progress())
            name = f"{strategy} {proposal} {objective} {size}"
            found[name] = gradients(setup, first_batch(setup))
    for objective, size, terms in REFERENCE:
        more = sampling("mixed", 6) if terms == "sampled" else ()
        price = ("objective.kl=0.7", f"objective.kl_policy={runs / 'reference'}")
        config = config_of(folder, runs, "replicated", objective, size, *more, *price)
        setup = build_setup(config, data, model, workers, Progress())
        found[f"replicated reference {terms} {objective} {size}"] = gradients(
            setup, first_batch(setup)
        )
    return found


def sampling(proposal: str, draws: int) -> tuple[str, ...]:
    return (
        "training.terms=sampled",
        f"sampling.proposal={proposal}",
        f"sampling.num_samples={draws}",
        "sampling.top_k=3",
    )


@pytest.fixture(scope="module")
def results(simulated: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """By number of workers, 0 for the plain one-process run; rank 0 has the whole policy's."""
    folder = tmp_path_factory.mktemp("gradients")
    config = config_of(simulated, folder, "replicated", "ips", 31, "policy.temperature=0.3")
    data = open_data(config, Progress())
    reference = TwoTowerPolicy(config.policy, data.context_encoding, data.item_encoding)
    save_policy(folder / "reference", reference, {})
    of_each_size(WORKERS, all_cases, folder, simulated, folder)
    found = {
        size: [torch.load(folder / f"{size}-{rank}.pt", weights_only=False) for rank in range(size)]
        for size in range(1, WORKERS + 1)
    }
    return {0: [all_cases(SINGLE_PROCESS, simulated, folder)], **found}


NAMES = [
    *(f"{s} {o} {b}" for o, b, s in PAIRS),
    *(f"{s} {p} {o} {b}" for p, o, b, _ in SAMPLED for s in STRATEGIES),
    *(f"replicated reference {t} {o} {b}" for o, b, t in REFERENCE),
]


@pytest.mark.parametrize("name", NAMES)
def test_gradients_do_not_depend_on_the_workers(results: dict[int, Any], name: str) -> None:
    """Against one process with the whole catalogue: loss, value, weights, norm, every parameter."""
    expected = results[0][0][name.replace("item_sharded", "replicated")]
    scale = max(float(g.abs().max()) for g in expected["gradients"].values())
    assert scale > 1e-4
    for size in range(1, WORKERS + 1):
        for rank in range(size):
            found = results[size][rank][name]
            for key in ("loss", "value", "norm"):
                assert found[key] == pytest.approx(expected[key], rel=2e-5, abs=1e-6), (size, key)
            if expected["measures"] is None:
                assert found["measures"] is None
            else:
                assert found["measures"] == pytest.approx(expected["measures"], rel=1e-4)
            if rank == 0:
                for parameter, gradient in expected["gradients"].items():
                    torch.testing.assert_close(
                        found["gradients"][parameter],
                        gradient,
                        rtol=2e-5,
                        atol=2e-6 * scale,
                        msg=lambda text, at=(size, parameter): f"{at}: {text}",
                    )


@pytest.mark.parametrize("name", NAMES)
def test_workers_agree_to_the_bit(results: dict[int, Any], name: str) -> None:
    """What all workers have gets the same gradient on each, so they never drift apart."""
    for size in range(2, WORKERS + 1):
        first = results[size][0][name]
        for rank in range(1, size):
            other = results[size][rank][name]
            assert other["loss"] == first["loss"] and other["norm"] == first["norm"]
            for parameter, gradient in other["gradients"].items():
                if gradient.shape == first["gradients"][parameter].shape:
                    torch.testing.assert_close(
                        gradient, first["gradients"][parameter], rtol=0, atol=0
                    )


def test_the_divergence_is_of_all_rows(results: dict[int, Any]) -> None:
    for objective, size, terms in REFERENCE:
        assert (
            results[0][0][f"replicated reference {terms} {objective} {size}"]["measures"][
                "divergence"
            ]
            > 1e-3
        )


def test_the_id_table_is_split(results: dict[int, Any]) -> None:
    """With an id in the catalogue a worker has its items' rows, and one for the unknown."""
    whole = results[0][0]["replicated dr 31"]["gradients"]
    split = [
        [name for name, g in results[2][1]["item_sharded dr 31"]["gradients"].items()
         if g.shape != whole[name].shape]
    ][0]  # fmt: skip
    assert split
    for name in split:
        assert whole[name].shape[0] == 15
        assert results[2][1]["item_sharded dr 31"]["gradients"][name].shape[0] == 8
