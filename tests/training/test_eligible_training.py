"""Training over eligible items, against a masked softmax in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax
from torch import Tensor

from offtower.config import Config, SamplingConfig, parse_config
from offtower.crossfit.reward_model import obtain_reward_model
from offtower.data.encoding import BagArray, to_tensors
from offtower.data.order import EpochOrder
from offtower.data.reader import Step
from offtower.errors import ConfigError
from offtower.models.policy import TwoTowerPolicy
from offtower.models.reward.base import RewardModel
from offtower.prepare import PreparedData
from offtower.progress import Progress
from offtower.sampling import Proposal
from offtower.sampling.draw_sources import UniformSource
from offtower.training.auto.candidates import make_candidates
from offtower.training.auto.evaluator import SCAN_ROWS, HeldOutEvaluator
from offtower.training.auto.folds import Folds
from offtower.training.sampled import SampledTerms
from offtower.training.setup import TrainingSetup, build_setup
from offtower.training.step import ReplicatedStep
from offtower.training.two_stage import LoggedClusterWeights
from offtower.training.workers import SINGLE_PROCESS
from tests.training.eligible_data import N, prepared

SETS = [("attribute",), ("interval", "exclude"), ("attribute", "exclude", "candidates")]


def config_of(objective: str, **training: Any) -> Config:
    tower = {"hidden_layer_sizes": [6], "unknown_rate": 0.0}
    return parse_config(
        {
            "name": "eligible",
            "data": {"train": "in-memory", "catalogue": "in-memory"},
            "policy": {
                "embedding_dim": 4,
                "context_tower": tower,
                "item_tower": tower,
                "item_bias": True,
                "temperature": 0.5,
            },
            "reward_model": {"kind": "factored", "folds": 2, "epochs": 1, "tower": tower},
            "objective": {"name": objective},
            "training": {"batch_size": 64, "item_chunk": 32, "threads": 1, **training},
        },
        source="test",
    )


def setup_of(
    objective: str, forms: tuple[str, ...], **training: Any
) -> tuple[TrainingSetup, PreparedData, RewardModel, np.ndarray]:
    data, sets = prepared(160, *forms)
    config = config_of(objective, **training)
    model = obtain_reward_model(config.reward_model, data, 0, Progress())
    assert model is not None
    setup = build_setup(config, data, model, SINGLE_PROCESS, Progress())
    return setup, data, model, sets


def batch_of(data: PreparedData) -> Step:
    order = EpochOrder(data.train.row_group_sizes, 64, 0, num_folds=2)
    with data.batches(order) as reader:
        return next(iter(reader.epoch(0)))


def dense_terms(
    setup: TrainingSetup, batch: Step, sets: np.ndarray, model: RewardModel
) -> dict[str, Tensor]:
    """Terms of the batch from (B, N) arrays in float64; differentiable in the weights."""
    policy = setup.policy
    u = policy.embed_contexts(to_tensors(batch.rows.context)).double()
    items = policy.embed_items(setup.data.items)
    assert items.bias is not None
    score = u @ items.embedding.double().T / policy.temperature + items.bias.double()
    mask = torch.from_numpy(sets[batch.rows.row])
    log_pi = torch.log_softmax(score.masked_fill(~mask, float("-inf")), dim=1)
    reward = model.for_training_rows(batch.rows, batch.fold)
    q = torch.sigmoid(
        reward.context.double() @ reward.item.double().T + reward.item_bias.double()  # type: ignore
    )
    pi = log_pi.exp()
    action = torch.from_numpy(batch.rows.action)[:, None]
    return {
        "log_prob": log_pi.gather(1, action)[:, 0],
        "expected": (pi * q).sum(dim=1),
        "logged": q.gather(1, action)[:, 0],
        "entropy": -(pi * log_pi.masked_fill(~mask, 0.0)).sum(dim=1),
    }


@pytest.mark.parametrize("forms", SETS)
def test_the_gradient_of_dr_is_that_of_the_masked_softmax(forms: tuple[str, ...]) -> None:
    setup, data, model, sets = setup_of("dr", forms)
    assert isinstance(setup.step, ReplicatedStep)
    batch = batch_of(data)
    value, diagnostics = setup.step.loss(batch, diagnose=True)
    parameters = dict(setup.policy.named_parameters())
    found = torch.autograd.grad(value.loss, parameters.values(), allow_unused=True)
    terms = dense_terms(setup, batch, sets, model)
    assert batch.rows.pscore is not None and diagnostics is not None
    weight = terms["log_prob"].exp() / torch.from_numpy(batch.rows.pscore)
    error = torch.from_numpy(batch.rows.reward).double() - terms["logged"]
    wanted_value = (weight * error + terms["expected"]).mean()
    assert float(value.value.detach()) == pytest.approx(wanted_value.item(), abs=1e-6)
    wanted = torch.autograd.grad(-wanted_value, parameters.values(), allow_unused=True)
    scale = max(w.abs().max().item() for w in wanted if w is not None)
    assert scale > 1e-4
    for name, one, other in zip(parameters, found, wanted, strict=True):
        if other is not None:
            assert one is not None, name
            assert float((one - other).abs().max()) < 2e-5 * scale, name
    assert diagnostics.entropy == pytest.approx(terms["entropy"].mean().item(), rel=1e-5)
    assert diagnostics.entropy < float(np.log(sets.sum(axis=1)).mean())


def test_sampled_terms_that_count_every_item_are_exact() -> None:
    forms = ("interval", "exclude")
    exact, data, _, _ = setup_of("dr", forms)
    config = replace(
        config_of("dr", terms="sampled"), sampling=SamplingConfig("top_k", num_samples=5, top_k=N)
    )
    model = obtain_reward_model(config.reward_model, data, 0, Progress())
    sampled = build_setup(config, data, model, SINGLE_PROCESS, Progress())
    assert sampled.step.proposal is not None
    sampled.step.proposal.at_step(0)
    batch, found = batch_of(data), []
    for setup in (exact, sampled):
        value, _ = setup.step.loss(batch)
        found.append(torch.autograd.grad(value.loss, list(setup.policy.parameters())))
    sampled.step.proposal.close()
    scale = max(float(one.abs().max()) for one in found[0])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * scale)


def test_draws_that_no_row_may_show_do_not_count() -> None:
    """The mean of the estimated normalizers over 300 seeds is the exact one.

    Each of 32 rows lies within 5 standard errors: false alarms below 1e-4.
    """
    setup, data, _, _ = setup_of("ips", ("interval", "exclude"))
    batch = batch_of(data)
    rows = batch.rows.take(np.arange(32))
    assert rows.eligible is not None
    draws = SampledTerms(setup.policy, data.items, Proposal([UniformSource(N, 40)]))
    with torch.no_grad():
        u = setup.policy.embed_contexts(to_tensors(rows.context))
        items = setup.policy.embed_items(data.items)
        action, eligible = torch.from_numpy(rows.action), rows.eligible.on()
        exact = setup.policy.terms(u, items, action, eligible=eligible).log_normalizer
        found = []
        for seed in range(300):
            touched = draws.touched(u, action, seed, eligible=eligible)
            terms = touched.terms(u, draws.embed(touched), temperature=setup.policy.temperature)
            found.append((terms.log_normalizer - exact).exp())
    ratio = torch.stack(found)
    error = ratio.std(dim=0) / 300**0.5
    assert float(error.max()) < 0.05
    assert bool(((ratio.mean(dim=0) - 1.0).abs() < 5 * error + 1e-5).all())


def test_candidates_are_all_that_a_step_embeds(monkeypatch: pytest.MonkeyPatch) -> None:
    setup, data, _, _ = setup_of("ips", ("candidates",))
    batch = batch_of(data)

    def refused(*args: Any, **options: Any) -> None:
        raise AssertionError("the whole catalogue is embedded")

    monkeypatch.setattr(type(setup.policy), "embed_items", refused)
    setup.step.loss(batch)


def test_a_row_with_one_eligible_item_has_probability_one() -> None:
    setup, data, _, _ = setup_of("ips", ("attribute", "candidates"))
    batch = batch_of(data)
    sets = batch.rows.eligible
    assert sets is not None
    only = BagArray(batch.rows.action, np.arange(len(batch.rows) + 1))
    alone = replace(batch.rows, eligible=replace(sets, candidates=only))
    step = setup.step
    assert isinstance(step, ReplicatedStep)
    found = step.diagnostics(Step(batch.cursor, alone, batch.fold))
    assert found.entropy == 0.0
    assert found.largest_weight == pytest.approx(float(1.0 / batch.rows.pscore.min()))


@pytest.mark.parametrize("forms", SETS[:2])
def test_cluster_weights_of_potec_are_over_eligible_items(forms: tuple[str, ...]) -> None:
    data, sets = prepared(160, *forms)
    config = config_of("potec")
    config = replace(
        config,
        policy=replace(config.policy, temperature=1.0),
        objective=replace(config.objective, arguments={"clusters": 3, "inverse_temperature": 2.0}),
    )
    model = obtain_reward_model(config.reward_model, data, 0, Progress())
    setup = build_setup(config, data, model, SINGLE_PROCESS, Progress())
    step, batch = setup.step, batch_of(data)
    assert isinstance(step, ReplicatedStep) and batch.rows.eligible is not None
    weights = step.trained.cluster_weights
    assert isinstance(weights, LoggedClusterWeights)
    policy, context = setup.policy.eval(), to_tensors(batch.rows.context)
    rows, action = np.arange(len(batch.rows)), torch.from_numpy(batch.rows.action)
    mask, label = sets[batch.rows.row], weights._cluster.numpy()
    with torch.no_grad():
        u, items = policy.embed_contexts(context), policy.embed_items(data.items)
        assert items.bias is not None
        score = (u @ items.embedding.T + items.bias).double().numpy()
        pi = softmax(np.where(mask, score, -np.inf), axis=1)
        present = mask @ np.eye(label.max() + 1)[label] > 0
        logging = weights._logging[batch.fold](context)[0].double().numpy()
        logging = softmax(np.where(present, logging, -np.inf), axis=1)
        terms = policy.terms(u, items, action, eligible=batch.rows.eligible.on())
        found = weights(batch, context, terms)
    logged = label[batch.rows.action]
    first = np.array([pi[i, label == logged[i]].sum() for i in rows])
    wanted = np.log(first) - np.log(logging[rows, logged])
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6, atol=2e-5)
    value, _ = step.loss(batch)
    assert torch.isfinite(value.loss)


def test_auto_weighs_held_out_rows_over_eligible_items() -> None:
    data, sets = prepared(160, "attribute", "exclude")
    config, policies = config_of("auto"), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        policies.append(TwoTowerPolicy(config.policy, data.context_encoding, data.item_encoding))
        policies[-1].eval().requires_grad_(False)
    folds = Folds(2, (0, 1), 0)
    evaluator = HeldOutEvaluator(data, folds, 1000, 64)
    found = evaluator.terms(evaluator.candidates({"a": policies}, [], binary=True))
    parts = []
    for rows in data.scan(SCAN_ROWS):
        fold = folds.of(rows)
        for member in (0, 1):
            parts.append((member, rows.take(np.flatnonzero(fold == member))))
    for one in found.policies("a"):
        wanted = []
        for member, rows in parts:
            policy = policies[member]
            with torch.no_grad():
                u = policy.embed_contexts(to_tensors(rows.context)).double()
                items = policy.embed_items(data.items)
                assert items.bias is not None and rows.pscore is not None
                score = u @ items.embedding.double().T + items.bias.double()
            score = one.inverse_temperature * score.numpy()
            pi = softmax(np.where(sets[rows.row], score, -np.inf), axis=1)
            wanted.append(pi[np.arange(len(rows)), rows.action] / rows.pscore)
        weight = found.terms[one].weight
        np.testing.assert_allclose(weight, np.concatenate(wanted), rtol=1e-4, atol=1e-9)


def test_objectives_that_sum_over_all_items_are_refused() -> None:
    data, _ = prepared(60, "attribute")
    with pytest.raises(ConfigError, match="sums squares over all items"):
        build_setup(config_of("implicit_squares"), data, None, SINGLE_PROCESS, Progress())
    config = config_of("auto")
    assert "implicit_linear" not in [one.name for one in make_candidates(config, data)]
    config = replace(config, auto=replace(config.auto, candidates=("implicit_linear",)))
    with pytest.raises(ConfigError, match="sums squares over all items"):
        make_candidates(config, data)
