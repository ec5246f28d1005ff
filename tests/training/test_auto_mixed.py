"""The mixed model of `auto`: its optimum, the policy that holds it, and races with it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy.optimize import minimize

from offtower.benchmarks.million.world import make_world
from offtower.config import parse_config
from offtower.data.catalogue import Catalogue, write_catalogue
from offtower.data.log import TableLog, write_log
from offtower.data.schema import CatalogueSchema, FeatureSpec, LogSchema
from offtower.data.simulate import SimulatedWorld, WorldSettings
from offtower.errors import ConfigError
from offtower.models.policy import TwoTowerPolicy
from offtower.prepare import PreparedData, prepare
from offtower.progress import Progress
from offtower.training.auto import speed
from offtower.training.auto.candidates import make_candidates
from offtower.training.auto.ensemble import join
from offtower.training.auto.evaluator import HeldOutEvaluator
from offtower.training.auto.folds import Folds
from offtower.training.auto.item_pass import ItemPass
from offtower.training.auto.kept_rows import keep_thinned, thinning_for
from offtower.training.auto.mixed_model import MixedRows, _Fit, fit_mixed_model
from offtower.training.auto.mixed_policy import (
    MIXED,
    context_width,
    fit_mixed_members,
    fit_mixed_policy,
)
from offtower.training.auto.plan import read_plan
from offtower.training.run import train_run
from tests.training.test_auto_budget import Machine, config_of
from tests.training.test_auto_race import assert_same_policies, raced

BASE = {"name": "x", "data": {"train": "memory", "catalogue": "memory"}}


def model_rows(n: int, seed: int, *, binary: bool) -> tuple[MixedRows, dict[str, torch.Tensor]]:
    """Rows of a model with a covariance of rank 2, and its effects."""
    rng = np.random.default_rng(seed)
    k, p, q = 400, 5, 3
    root = np.zeros((p, p))
    root[:, :2] = rng.standard_normal((p, 2))
    effects = {
        "constant": np.array([0.3, 0.0, 0.0, -0.2, -1.0]),
        "numbers": 0.5 * rng.standard_normal((q, p)) @ root.T,
        "ids": 0.7 * rng.standard_normal((k, p)) @ root.T,
    }
    context = np.concatenate([rng.standard_normal((n, p - 1)), np.ones((n, 1))], axis=1)
    item, numbers = rng.integers(0, k, n), rng.standard_normal((k, q))
    effect = effects["constant"] + numbers @ effects["numbers"] + effects["ids"]
    z = (context * effect[item]).sum(1)
    reward = rng.random(n) < 1 / (1 + np.exp(-z)) if binary else z + rng.standard_normal(n)
    return MixedRows(
        torch.from_numpy(context).float(),
        torch.from_numpy(item),
        torch.from_numpy(reward.astype(np.float32)),
        torch.from_numpy(rng.choice([1.0, 3.0], n)).float(),
        torch.from_numpy(numbers).float(),
        [torch.arange(k)],
    ), {"effect": torch.from_numpy(effect).float()}


@pytest.mark.parametrize("binary", [True, False])
def test_newton_steps_reach_the_optimum_of_float64(binary: bool) -> None:
    """At fixed priors, against scipy with gradients by autograd."""
    rows, _ = model_rows(3000, 1, binary=binary)
    fit = _Fit(rows, binary=binary)
    for _ in range(8):
        fit._step()
    found = fit._scaled(fit._effects)
    shapes = [one.shape for one in found]
    sizes = [one.numel() for one in found]
    context, weight = rows.context.double(), rows.weight
    assert weight is not None

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        free = torch.from_numpy(flat).requires_grad_()
        parts = [part.view(shape) for part, shape in zip(free.split(sizes), shapes, strict=True)]
        effect = parts[0] + rows.numbers.double() @ parts[1] + parts[2]
        z = (context * effect[rows.item]).sum(1)
        reward = rows.reward.double()
        each = (
            torch.nn.functional.binary_cross_entropy_with_logits(z, reward, reduction="none")
            if binary
            else 0.5 * (z - reward).square() / fit._noise
        )
        total = each @ weight.double()
        for part, scale in zip(parts, fit._scale, strict=True):
            total = total + part.square().sum() / (2 * scale)
        total.backward()
        assert free.grad is not None
        return float(total.detach()), free.grad.numpy()

    flat = torch.cat([one.flatten() for one in found]).double().numpy()
    best = minimize(loss, flat, jac=True, method="L-BFGS-B", options={"maxiter": 2000})
    np.testing.assert_allclose(flat, best.x, atol=0.02 * np.abs(best.x).max())
    assert loss(flat)[0] - best.fun < 1e-4 * best.fun


@pytest.mark.parametrize("binary", [True, False])
def test_fitted_priors_beat_those_that_are_not(binary: bool) -> None:
    """A covariance of rank 2 is found: the error of the effects is smaller than with any multiple
    of the identity."""
    rows, true = model_rows(8000, 2, binary=binary)

    def error(fit: _Fit) -> float:
        constant, numbers, ids = fit._scaled(fit._effects)
        effect = (constant + rows.numbers @ numbers + ids) @ fit._root.T
        return float((effect - true["effect"]).square().mean())

    fixed = []
    for scale in (0.03, 0.1, 0.3, 1.0, 3.0):
        fit = _Fit(rows, binary=binary)
        fit._scale = [fit._scale[0], scale, scale]
        for _ in range(5):
            fit._step()
        fixed.append(error(fit))
    fit = _Fit(rows, binary=binary)
    fit.run()
    assert error(fit) < 0.85 * min(fixed)
    again = fit_mixed_model(rows, binary=binary)
    assert torch.equal(again.root, fit._root)


def mixed_data(*, numbers: bool) -> PreparedData:
    """A log with a category on both sides; items with numbers or ids alone."""
    rng = np.random.default_rng(0)
    n, items = 4000, 60
    ids = np.array([f"i{k}" for k in range(items)])
    columns = {"item_id": ids, "kind": rng.choice(["a", "b", "c"], items)}
    features = [
        FeatureSpec(name="kind", kind="category"),
        FeatureSpec(name="item_id", kind="category"),
    ]
    if numbers:
        columns["price"] = rng.random(items)
        features.append(FeatureSpec(name="price", kind="numeric"))
    catalogue = Catalogue(
        pa.table(columns), CatalogueSchema(item_id="item_id", features=tuple(features)), "c"
    )
    context = [FeatureSpec(name="device", kind="category")]
    table = {
        "device": rng.choice(["x", "y"], n),
        "item_id": ids[rng.integers(0, items - 5, n)],
        "reward": (rng.random(n) < 0.1).astype(float),
        "pscore": np.full(n, 1 / items),
    }
    if numbers:
        context.append(FeatureSpec(name="age", kind="numeric"))
        table["age"] = rng.standard_normal(n)
    schema = LogSchema(action="item_id", reward="reward", pscore="pscore", context=tuple(context))
    return prepare(TableLog(pa.table(table), schema), None, catalogue, Progress())


@pytest.mark.parametrize("numbers", [True, False])
def test_the_policy_predicts_what_the_model_does(numbers: bool) -> None:
    data = mixed_data(numbers=numbers)
    candidates = make_candidates(config_of(candidates=[MIXED]), data)
    (candidate,) = candidates
    assert candidate.policy.embedding_dim == context_width(data)
    policy = TwoTowerPolicy(candidate.policy, data.context_encoding, data.item_encoding).eval()
    (rows,) = data.scan(8192)
    fit_mixed_policy(policy, rows, data.items, binary=True)
    from offtower.training.auto.mixed_policy import _Design

    design = _Design.of(rows, data.items, policy)
    effects = fit_mixed_model(design.rows, binary=True)
    effect = effects.constant + design.rows.numbers @ effects.numbers
    for value, table in zip(design.rows.categories, effects.categories, strict=True):
        effect = effect + table[value]
    expected = (design.rows.context @ effects.root * effect[design.rows.item]).sum(1)
    with torch.no_grad():
        context = {name: torch.from_numpy(value) for name, value in rows.context.items()}
        action = torch.from_numpy(rows.action)
        items = policy.embed_items(data.items)
        assert items.bias is not None
        found = policy.action_logit(context, data.items.at(action)) - items.bias[action]
        embedded = items.embedding
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # Items without rows share the effects of what they have in common with others.
    assert (embedded[-5:].norm(dim=1) > 0).all()


def test_thinned_rows_keep_the_rewarded_ones() -> None:
    data = mixed_data(numbers=True)
    kept = keep_thinned(data, 5, 0, Progress()).rows
    assert kept.reward.sum() == next(iter(data.scan(8192))).reward.sum()
    assert kept.row_weight is not None
    assert set(kept.row_weight[kept.reward == 0]) == {5.0}
    assert abs(kept.row_weight.sum() - 4000) < 4 * 5 * np.sqrt(4000 / 5)
    thinning = thinning_for(data, 4000, 1200)
    assert abs(len(keep_thinned(data, thinning, 0, Progress()).rows) - 1200) < 300
    assert thinning_for(data, 4000, 4000) == 1


def test_few_rewards_of_many_ids_are_enough() -> None:
    """Five times the value of the logging policy from 300 rewarded rows, also of thinned ones."""
    world = make_world("ids", 3000, 30_000, 0)
    (candidate,) = make_candidates(config_of(candidates=[MIXED]), world.data)
    encodings = (world.data.context_encoding, world.data.item_encoding)
    for thinning in (1, 5):
        policy = TwoTowerPolicy(candidate.policy, *encodings).eval()
        rows = keep_thinned(world.data, thinning, 0, Progress()).rows
        fit_mixed_policy(policy, rows, world.data.items, binary=True)
        with torch.no_grad():
            items = policy.embed_items(world.data.items)
            encoded = policy.context_encoding.encode(world.contexts)
            u = policy.embed_contexts({name: torch.from_numpy(x) for name, x in encoded.items()})
        assert world.value(u, items.embedding).greedy > 5 * world.baselines["logging"]
        # The base measure alone imitates the logging policy, which does not depend on contexts.
        assert items.bias is not None
        base = world.value(torch.zeros_like(u), items.embedding, items.bias).softmax
        assert base == pytest.approx(world.baselines["logging"], rel=0.1)


def test_policies_are_base_measures_tilted_by_scores() -> None:
    """Terms and joined members against float64 sums over all items."""
    data = mixed_data(numbers=True)
    (candidate,) = make_candidates(config_of(candidates=[MIXED]), data)
    (rows,) = data.scan(8192)
    folds = Folds(2, (0, 1), 0)
    encodings = (data.context_encoding, data.item_encoding)
    members = [TwoTowerPolicy(candidate.policy, *encodings).eval() for _ in range(2)]
    fit_mixed_members(members, folds, rows, data.items, binary=True)
    few = HeldOutEvaluator(data, folds, 10_000, 64)
    evaluated = few.candidates({MIXED: members}, [MIXED], binary=True, based=[MIXED])
    some = rows.take(np.arange(40))
    context = {name: torch.from_numpy(value) for name, value in some.context.items()}
    with torch.no_grad():
        items = [member.embed_items(data.items) for member in members]
        u = [member.embed_contexts(context) for member in members]
    bias = [one.bias.double().numpy() for one in items if one.bias is not None]
    score = [(x @ one.embedding.T).double().numpy() for x, one in zip(u, items, strict=True)]
    # The propensities of all rows are 1 / 60, so that the base is known where there are rows.
    seen = np.bincount(rows.action[folds.of(rows) != 0], minlength=data.items.num_items)
    np.testing.assert_allclose(np.exp(bias[0])[seen > 0], 1 / 60, rtol=1e-5)
    assert (np.exp(bias[0])[seen == 0] <= 1 / 60).all()
    block = ItemPass(data.items, data.device, 64).terms({MIXED: members[0]}, some, evaluated)
    for policy, log_prob, expected in zip(
        evaluated.policies, block.log_prob[MIXED], block.expected_reward[MIXED], strict=True
    ):
        pi = np.exp(bias[0] + policy.inverse_temperature * (score[0] - score[0].max()))
        pi /= pi.sum(axis=1, keepdims=True)
        at = pi[np.arange(40), some.action]
        # float32 scores times inverse temperatures of up to some hundreds.
        np.testing.assert_allclose(np.exp(log_prob), at, rtol=2e-2, atol=1e-30)
        np.testing.assert_allclose(expected, (pi / (1 + np.exp(-score[0]))).sum(1), rtol=1e-3)
    joined = join(members, 3.0, 1.0)
    with torch.no_grad():
        whole = joined.embed_items(data.items)
        assert whole.bias is not None
        logit = joined.embed_contexts(context) @ whole.embedding.T / joined.temperature + whole.bias
    wanted = 1.5 * (score[0] + score[1]) + 0.5 * (bias[0] + bias[1])
    np.testing.assert_allclose(logit.numpy(), wanted, rtol=1e-4, atol=1e-3)


def test_a_killed_race_has_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the first stage; the mixed model has its optimum from there on."""
    world = SimulatedWorld(12, WorldSettings(4, 4, 4, intercept=0.0), seed=1)
    write_catalogue(tmp_path / "catalogue", world.catalogue_table(), world.catalogue_schema)
    for name in ("train", "validation", "test"):
        write_log(tmp_path / name, world.log(600), world.log_schema, rows_per_group=100)
    monkeypatch.setattr(speed, "solution_seconds", lambda *_: 1e-3)
    Machine(monkeypatch, step=0.06)
    names = (MIXED, "regression_linear", "likelihood_linear", "likelihood")
    config = raced(tmp_path, tmp_path / "first", "race", candidates=names)
    train_run(config)
    plan = read_plan(config.run_directory)
    assert plan.bounded and len(plan.rungs) == 2
    assert plan.candidates[MIXED].steps is None and plan.candidates[MIXED].thinning == 1
    seconds = sum(one.training_seconds + one.evaluation_seconds for one in plan.rungs)
    assert seconds == pytest.approx(0.65 * 30.0, rel=0.1)
    again = raced(tmp_path, tmp_path / "second", "race", candidates=names)
    shutil.copytree(config.run_directory, again.run_directory)
    for name in ("auto/out_of_fold_2", "auto/refit", "policy"):
        shutil.rmtree(again.run_directory / name)
    train_run(again, resume=True)
    assert_same_policies(config.run_directory, again.run_directory)


def test_it_begins_large_catalogues_without_bags_or_histories() -> None:
    data = mixed_data(numbers=True)
    assert MIXED not in [one.name for one in make_candidates(config_of(), data)]
    large = parse_config({**BASE, "sampling": {"num_samples": 8}})
    assert make_candidates(large, data)[0].name == MIXED
    history = FeatureSpec(name="seen", kind="history")
    assert isinstance(data.train, TableLog)
    table = next(iter(data.train.tables()))
    seen = pa.array([["i1", "i2"]] * table.num_rows)
    schema = replace(data.train.schema, context=(*data.train.schema.context, history))
    log = TableLog(table.append_column("seen", seen), schema)
    with_history = prepare(log, None, data.catalogue, Progress())
    assert MIXED not in [one.name for one in make_candidates(large, with_history)]
    world = SimulatedWorld(12, WorldSettings(4, 4, 4, feature_kinds="all"), seed=1)
    log = TableLog(pa.concat_tables(world.log(50)), world.log_schema)
    bags = prepare(log, None, world.catalogue(), Progress())
    with pytest.raises(ConfigError, match="'regression_mixed' needs contexts of numbers, vectors"):
        make_candidates(config_of(candidates=[MIXED]), bags)
