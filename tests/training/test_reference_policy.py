"""The exact KL to a known logging policy: by enumeration, and through whole runs."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from offtower.config import Config
from offtower.crossfit.reward_model import obtain_reward_model
from offtower.data.encoding import to_tensors
from offtower.data.reader import Step
from offtower.errors import ConfigError, RunError
from offtower.metrics import read_metrics
from offtower.models.policy import TwoTowerPolicy
from offtower.models.store import load_policy, save_policy
from offtower.objectives import LoggedRows, Reduction, Regularized, make_objective
from offtower.ops import DenseReward, FactoredReward, policy_terms
from offtower.prepare import PreparedData, open_data
from offtower.progress import Progress
from offtower.sampling import Proposal
from offtower.sampling.draw_sources import UniformSource
from offtower.training.reference_policy import kl_divergence, log_normalizer
from offtower.training.run import train_run
from offtower.training.sampled import SampledTerms
from offtower.training.setup import TrainingSetup, build_setup
from offtower.training.step import ReplicatedStep, StepKey
from offtower.training.workers import SINGLE_PROCESS
from tests.training.conftest import EVERY_STEP, make_config
from tests.training.test_resume import assert_same_policy, fill_the_disk, weights

ROWS, ITEMS = 7, 5
WEIGHT = 0.3


def log_softmax(logit: Tensor) -> Tensor:
    return logit - logit.exp().sum(dim=1, keepdim=True).log()


@pytest.mark.parametrize("name", ["ips", "dr"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("known_bias", [False, True])
@pytest.mark.parametrize("tau", [1.0, 0.6])
def test_value_and_gradient_by_enumeration(
    name: str, bias: bool, known_bias: bool, tau: float
) -> None:
    """In float64; pi_0 has embeddings of another width and a temperature of its own."""
    rng = np.random.default_rng(1)
    u, v, b = (
        torch.from_numpy(rng.normal(size=s)).requires_grad_()
        for s in ((ROWS, 3), (ITEMS, 3), ITEMS)
    )
    u0, v0, b0 = (torch.from_numpy(rng.normal(size=s)) for s in ((ROWS, 4), (ITEMS, 4), ITEMS))
    action = torch.from_numpy(rng.integers(0, ITEMS, ROWS))
    reward, q = torch.from_numpy(rng.random(ROWS)), torch.from_numpy(rng.random((ROWS, ITEMS)))
    pscore = torch.from_numpy(rng.uniform(0.1, 1.0, ROWS))
    leaves = [u, v, b] if bias else [u, v]

    log_pi = log_softmax(u @ v.T / tau + (b if bias else 0.0))
    log_known = log_softmax(u0 @ v0.T / 0.7 + (b0 if known_bias else 0.0))
    kl = torch.stack(
        [
            sum(log_pi[i, a].exp() * (log_pi[i, a] - log_known[i, a]) for a in range(ITEMS))
            for i in range(ROWS)
        ]
    )
    weight = log_pi[torch.arange(ROWS), action].exp() / pscore
    value = weight * reward
    if name == "dr":
        own = q[torch.arange(ROWS), action]
        value = weight * (reward - own) + (log_pi.exp() * q).sum(1)
    wanted_loss = -value.mean() + WEIGHT * kl.mean()
    wanted = torch.autograd.grad(wanted_loss, leaves)

    scores = FactoredReward(u0 / 0.7, v0, b0 if known_bias else None)
    item_bias = b if bias else None
    against = policy_terms(
        u, v, action, temperature=tau, item_bias=item_bias, reward_model=scores, entropy=True
    )
    found = kl_divergence(against, log_normalizer(scores, action))
    torch.testing.assert_close(found, kl, rtol=0, atol=1e-12)
    model = DenseReward(q) if name == "dr" else None
    terms = policy_terms(u, v, action, temperature=tau, item_bias=item_bias, reward_model=model)
    rows = LoggedRows(reward, terms, pscore, divergence=found)
    objective = Regularized(make_objective(name), kl=WEIGHT, exact_kl=True)
    assert objective.requirements.divergence
    result = objective(rows, Reduction(ROWS))
    assert result.loss.item() == pytest.approx(wanted_loss.item(), abs=1e-12)
    assert result.value.item() == pytest.approx(value.mean().item(), abs=1e-12)
    for one, two in zip(torch.autograd.grad(result.loss, leaves), wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


def test_the_exact_kl_needs_no_propensities() -> None:
    cloning = make_objective("behavior_cloning")
    assert not Regularized(cloning, kl=1.0, exact_kl=True).requirements.pscore
    assert Regularized(cloning, kl=1.0).requirements.pscore
    assert Regularized(make_objective("ips"), kl=1.0, exact_kl=True).requirements.pscore


def config_of(simulated: Path, runs: Path, name: str, *overrides: str, **more: Any) -> Config:
    return make_config(
        *(simulated, runs, name, "reward_model.epochs=1", "policy.item_bias=true"),
        *("policy.temperature=0.8", "policy.context_tower.dropout=0.0", *overrides),
        **more,
    )


@pytest.fixture(scope="module")
def cloned(simulated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The policy folder of a run of behavior_cloning, at a low temperature."""
    config = config_of(
        *(simulated, tmp_path_factory.mktemp("clone"), "clone", "objective.name=behavior_cloning"),
        *("training.learning_rate=0.03", "training.epochs=3", "policy.temperature=0.5"),
    )
    train_run(config)
    return config.run_directory / "policy"


def loss_of(setup: TrainingSetup, *, training: bool = False) -> tuple[float, Any, list[Tensor]]:
    """Loss, measures and gradients of the first batch."""
    policy = setup.policy.train(training)
    trainer = setup.trainer()
    with trainer.reader() as reader:
        batch = next(iter(reader.epoch(0)))
    if setup.step.proposal is not None:
        setup.step.proposal.at_step(0)
    policy.zero_grad(set_to_none=True)
    value, measures = setup.step.loss(batch, diagnose=True, key=StepKey(1, 5))
    value.loss.backward()
    if setup.step.proposal is not None:
        setup.step.proposal.close()
    gradients = [
        torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in policy.parameters()
    ]
    return float(value.loss.detach()), measures, gradients


def build(config: Config, data: PreparedData | None = None) -> tuple[TrainingSetup, PreparedData]:
    data = data or open_data(config, Progress())
    model = None
    if config.objective.name == "dr":
        model = obtain_reward_model(config.reward_model, data, config.seed, Progress())
    return build_setup(config, data, model, SINGLE_PROCESS, Progress()), data


def naive_kl(policy: TwoTowerPolicy, known: TwoTowerPolicy, data: PreparedData, batch: Step) -> Any:
    """Mean over the batch, differentiable in the policy."""
    context = to_tensors(batch.rows.context)
    logs = []
    for one in (policy, known):
        items = one.embed_items(data.items)
        logit = one.embed_contexts(context) @ items.embedding.T / one.temperature
        logs.append(log_softmax(logit if items.bias is None else logit + items.bias))
    return (logs[0].exp() * (logs[0] - logs[1].detach())).sum(dim=1).mean()


@pytest.mark.parametrize("name", ["ips", "dr", "softmax"])
def test_a_step_of_towers_against_a_naive_softmax(
    simulated: Path, tmp_path: Path, cloned: Path, name: str
) -> None:
    """The KL term of loss and gradients, with the reference loaded from its folder."""
    base = config_of(simulated, tmp_path, "a", f"objective.name={name}")
    regularized = config_of(
        *(simulated, tmp_path, "a", f"objective.name={name}", f"objective.kl={WEIGHT}"),
        f"objective.kl_policy={cloned}",
    )
    plain, data = build(base)
    with_kl, _ = build(regularized, data)
    before, _, without = loss_of(plain)
    after, measures, gradients = loss_of(with_kl)
    policy = plain.policy.eval()
    with plain.trainer().reader() as reader:
        batch = next(iter(reader.epoch(0)))
    kl = naive_kl(policy, load_policy(cloned)[0], data, batch)
    assert kl.item() > 0.01
    assert measures.divergence == pytest.approx(kl.item(), rel=1e-5)
    assert after - before == pytest.approx(WEIGHT * kl.item(), abs=1e-6)
    parts = torch.autograd.grad(WEIGHT * kl, list(policy.parameters()), allow_unused=True)
    for one, two, part in zip(gradients, without, parts, strict=True):
        wanted = two if part is None else two + part
        torch.testing.assert_close(one, wanted, rtol=1e-4, atol=1e-6)


PROPOSALS = {
    "exact": (),
    "mixed": ("training.terms=sampled", "sampling.proposal=mixed", "sampling.num_samples=3"),
    "top_k": (
        *("training.terms=sampled", "sampling.proposal=top_k", "sampling.num_samples=3"),
        "sampling.top_k=2",
    ),
}


@pytest.mark.parametrize("proposal", PROPOSALS)
@pytest.mark.parametrize("name", ["behavior_cloning", "dr"])
def test_none_between_a_policy_and_itself(
    simulated: Path, tmp_path: Path, cloned: Path, name: str, proposal: str
) -> None:
    """KL and its gradient are zero where pi = pi_0, of any draws too."""
    found = []
    more = (*PROPOSALS[proposal], f"objective.name={name}", "policy.temperature=0.5")
    for penalty in ((), ("objective.kl=50", f"objective.kl_policy={cloned}")):
        config = config_of(
            simulated, tmp_path, "a", *more, *penalty, f"training.warm_start={cloned}"
        )
        found.append(loss_of(build(config)[0]))
    (plain, _, without), (regularized, measures, gradients) = found
    assert measures.divergence == pytest.approx(0.0, abs=1e-6)
    assert regularized == pytest.approx(plain, abs=5e-5)
    assert max(float(g.abs().max()) for g in without) > 1e-3
    for one, two in zip(gradients, without, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-4)


def test_draws_of_the_whole_catalogue_give_the_exact_one(
    simulated: Path, tmp_path: Path, cloned: Path
) -> None:
    penalty = (f"objective.kl={WEIGHT}", f"objective.kl_policy={cloned}")
    for name in ("ips", "dr"):
        setup, data = build(config_of(simulated, tmp_path, "a", f"objective.name={name}", *penalty))
        exact = loss_of(setup)
        step = setup.step
        assert isinstance(step, ReplicatedStep) and step.reference is not None
        draws = Proposal([UniformSource(data.items.num_items, 24)])
        drawn = ReplicatedStep(
            *(step.trained, step.objective, step.reward_model),
            sampled=SampledTerms(setup.policy, data.items, draws),
            reference=step.reference,
        )
        sampled = loss_of(replace(setup, step=drawn))
        assert sampled[0] == pytest.approx(exact[0], rel=1e-5)
        assert sampled[1].divergence == pytest.approx(exact[1].divergence, rel=1e-4)
        for one, two in zip(sampled[2], exact[2], strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_in_bfloat16_it_is_that_of_rounded_scores(
    simulated: Path, tmp_path: Path, cloned: Path
) -> None:
    penalty = (
        f"objective.kl={WEIGHT}",
        f"objective.kl_policy={cloned}",
        "objective.name=ips",
    )
    low = config_of(simulated, tmp_path, "a", *penalty, "training.precision=bfloat16")
    high = config_of(simulated, tmp_path, "a", *penalty)
    setup, data = build(low)
    setup.policy.seed_draws(1)
    found = loss_of(setup, training=True)[1].divergence
    other, _ = build(high, data)
    other.policy.seed_draws(1)
    assert found == pytest.approx(loss_of(other, training=True)[1].divergence, rel=0.05)


def last_divergence(config: Config) -> float:
    lines = read_metrics(config.run_directory / "metrics.jsonl")
    epochs = [line for line in lines if line["kind"] == "epoch"]
    return float(epochs[-1]["divergence"])


def test_a_large_penalty_keeps_the_reference(simulated: Path, tmp_path: Path, cloned: Path) -> None:
    """Started at the reference, a huge coefficient keeps the policy there, a tiny one does not."""
    found = {}
    for penalty in (1e-9, 1e3):
        config = config_of(
            *(
                simulated,
                tmp_path,
                f"penalty-{penalty:g}",
                "objective.name=ips",
                "data.validation=null",
            ),
            *(f"objective.kl={penalty}", f"objective.kl_policy={cloned}"),
            *(f"training.warm_start={cloned}", "policy.temperature=0.5", "training.epochs=4"),
            *("training.learning_rate=0.01",),
            *("policy.item_tower.unknown_rate=0.0", "policy.context_tower.unknown_rate=0.0"),
            "training.weight_decay=0.0",
        )
        train_run(config)
        found[penalty] = last_divergence(config)
    assert found[1e-9] > 0.05
    assert found[1e3] < 0.02 * found[1e-9]


def test_a_broken_run_resumes_to_the_same_bits(
    simulated: Path, tmp_path: Path, cloned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("training.epochs=2", "objective.kl=0.2", f"objective.kl_policy={cloned}")
    whole = config_of(simulated, tmp_path / "whole", "a", *more)
    train_run(whole)
    broken = config_of(simulated, tmp_path / "broken", "a", *more, EVERY_STEP)
    fill_the_disk(monkeypatch, after=26)
    with pytest.raises(RunError, match="No space left"):
        train_run(broken)
    monkeypatch.undo()
    train_run(broken, resume=True)
    assert_same_policy(broken.run_directory, whole.run_directory)
    other = config_of(simulated, tmp_path / "other", "a", "training.epochs=2")
    train_run(other)
    one, two = weights(other.run_directory), weights(whole.run_directory)
    assert any(not np.array_equal(one[name], two[name]) for name in one)


def test_another_policy_in_its_place_is_noticed(
    simulated: Path, tmp_path: Path, cloned: Path
) -> None:
    folder = tmp_path / "known"
    shutil.copytree(cloned, folder)
    config = config_of(
        *(simulated, tmp_path, "a", "training.epochs=1", "objective.name=ips"),
        *("objective.kl=0.2", f"objective.kl_policy={folder}"),
    )
    train_run(config)
    train_run(config, resume=True)
    policy, facts = load_policy(folder)
    with torch.no_grad():
        next(policy.parameters()).mul_(1.5)
    save_policy(folder, policy, facts)
    with pytest.raises(RunError, match="another configuration or other data"):
        train_run(config, resume=True)


def test_a_log_without_propensities_is_enough(
    simulated: Path, tmp_path: Path, cloned: Path
) -> None:
    """A clone of who logged, and what stays near it: neither step reads a propensity."""
    more = ("training.epochs=2", "data.validation=null", "objective.name=softmax")
    config = config_of(simulated, tmp_path, "a", *more, "objective.kl=0.2")
    schema = replace(open_data(config, Progress()).train.schema, pscore=None)
    config.data.log_schema = schema.to_dict()
    with pytest.raises(ConfigError, match="needs the logged propensities"):
        train_run(config)
    clone = config_of(simulated, tmp_path, "c", *more[:2], "objective.name=behavior_cloning")
    clone.data.log_schema = schema.to_dict()
    train_run(clone)
    lines = read_metrics(clone.run_directory / "metrics.jsonl")
    assert [line["value_estimate"] for line in lines if line["kind"] == "epoch"] == [None, None]
    config = config_of(
        *(simulated, tmp_path, "b", *more, "objective.kl=0.2"),
        f"objective.kl_policy={clone.run_directory / 'policy'}",
    )
    config.data.log_schema = schema.to_dict()
    train_run(config)
    assert last_divergence(config) > 0.0


def test_runs_without_a_reference_policy_report_no_divergence(
    simulated: Path, tmp_path: Path
) -> None:
    config = config_of(simulated, tmp_path, "a", "objective.kl=0.2", "training.epochs=1")
    train_run(config)
    lines = read_metrics(config.run_directory / "metrics.jsonl")
    assert lines and not any("divergence" in line for line in lines)


def test_refusals(simulated: Path, tmp_path: Path, cloned: Path) -> None:
    there = f"objective.kl_policy={cloned}"

    def said(message: str, *overrides: str, **more: Any) -> None:
        with pytest.raises(ConfigError, match=message):
            train_run(config_of(simulated, tmp_path, message[:5], *overrides, **more))

    said("no effect while objective.kl is 0", there)
    said(
        "objective.name=auto does not support kl_policy",
        there,
        "objective.kl=1",
        "objective.name=auto",
    )
    said("there is no policy at", "objective.kl=1", "objective.kl_policy=nowhere")
    said("warm_start: there is no policy at", "training.warm_start=nowhere")
    sharded = (there, "objective.kl=1", "training.strategy=item_sharded")
    said("over the whole catalogue", *sharded)
    said("has no policy terms", there, "objective.kl=1", "objective.name=regression")
    assert not list(tmp_path.rglob("reward_model"))


def test_a_policy_of_other_encodings_is_refused(
    simulated: Path, tmp_path: Path, cloned: Path
) -> None:
    """That of a run on another log, whose numbers have other means."""
    config = config_of(
        *(simulated, tmp_path, "a", f"data.train={simulated / 'validation'}"),
        *("objective.name=ips", "objective.kl=1", f"objective.kl_policy={cloned}"),
    )
    with pytest.raises(ConfigError, match=r"objective\.kl_policy: .* another context encoding"):
        train_run(config)
