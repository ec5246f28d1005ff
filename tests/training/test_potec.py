"""A policy in two stages: what is frozen, what its weights are, how it is stored and resumed."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.numpy import load_file

from offtower.config import Config, parse_config
from offtower.crossfit.reward_model import obtain_reward_model
from offtower.data.catalogue import Catalogue
from offtower.data.encoding import to_tensors
from offtower.data.log import ParquetLog, TableLog
from offtower.data.reader import Step, scan
from offtower.data.schema import CatalogueSchema, FeatureSpec, LogSchema
from offtower.errors import ConfigError
from offtower.models.items import ItemFeatures
from offtower.models.policy import TwoTowerPolicy
from offtower.models.reward.factored import FactoredRewardModel
from offtower.models.store import load_policy, save_policy
from offtower.models.two_stage import bodies
from offtower.prepare import PreparedData, open_data, prepare
from offtower.progress import Progress
from offtower.retrieval import ExportOptions, Retriever, export_run
from offtower.retrieval.manifest import read_manifest
from offtower.training.checkpoints import CheckpointStore
from offtower.training.run import train_run
from offtower.training.setup import TrainingSetup, build_setup
from offtower.training.step import ReplicatedStep
from offtower.training.two_stage import LoggedClusterWeights
from offtower.training.workers import SINGLE_PROCESS
from tests.training.conftest import EVERY_STEP, make_config

KAPPA = 4.0


def config_of(folder: Path, runs: Path, clusters: int | str, *more: str, name: str = "a") -> Config:
    return make_config(
        folder,
        runs,
        name,
        "objective.name=potec",
        f"objective.arguments.clusters={clusters}",
        f"objective.arguments.inverse_temperature={KAPPA}",
        *more,
    )


@pytest.fixture(scope="module", params=["genre", 4])
def trained(
    request: pytest.FixtureRequest, simulated: Path, tmp_path_factory: pytest.TempPathFactory
) -> SimpleNamespace:
    """A setup after three epochs with large steps, the policy as it was before, the data."""
    config = config_of(
        simulated,
        tmp_path_factory.mktemp("runs"),
        request.param,
        "training.epochs=3",
        "training.learning_rate=0.05",
        "policy.item_bias=true",
    )
    data = open_data(config, Progress())
    model = obtain_reward_model(config.reward_model, data, config.seed, Progress())
    assert isinstance(model, FactoredRewardModel)
    setup = build_setup(config, data, model, SINGLE_PROCESS, Progress())
    before = {name: tensor.clone() for name, tensor in setup.policy.state_dict().items()}
    setup.trainer().fit()
    return SimpleNamespace(
        config=config, data=data, model=model, setup=setup, before=before, clusters=request.param
    )


def contexts_of(data: PreparedData, rows: int = 40) -> Any:
    return next(iter(scan(data.train, data.catalogue, data.context_encoding, rows)))


def logits(policy: TwoTowerPolicy, context: Any, items: ItemFeatures) -> np.ndarray:
    """(rows, items) float64."""
    with torch.no_grad():
        found = policy.embed_items(items)
        u = policy.embed_contexts(to_tensors(context))
    assert found.bias is not None
    score: np.ndarray = (u.double() @ found.embedding.double().T + found.bias.double()).numpy()
    return score


def reward_logits(towers: list[TwoTowerPolicy], context: Any, items: ItemFeatures) -> np.ndarray:
    """Mean over the folds' models, one by one."""
    return np.mean([logits(tower, context, items) for tower in towers], axis=0)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def clusters_of(trained: SimpleNamespace) -> np.ndarray:
    """By the catalogue's column, or by the nearest centroid in float64."""
    data, (_, body) = trained.data, bodies(trained.setup.policy)
    if trained.clusters == "genre":
        spec = next(s for s in data.catalogue.schema.features if s.name == "genre")
        column = data.catalogue.table(0, data.catalogue.num_items).column(spec.source)
        return np.unique(np.array(column.to_pylist()), return_inverse=True)[1]
    with torch.no_grad():
        v = torch.cat([m.embed_items(data.items).embedding for m in trained.model.towers], dim=1)
    centroids = body.centroids.numpy().astype(np.float64)
    return ((v.double().numpy()[:, None] - centroids[None]) ** 2).sum(2).argmin(1)


def test_the_second_stage_is_the_reward_models_and_the_first_has_learned(
    trained: SimpleNamespace,
) -> None:
    data, policy = trained.data, trained.setup.policy
    context = contexts_of(data).context
    found = logits(policy, context, data.items)
    frozen = KAPPA * reward_logits(trained.model.towers, context, data.items)
    cluster = clusters_of(trained)
    assert len(np.unique(cluster)) > 1 and np.bincount(cluster).max() > 1
    for c in np.unique(cluster):
        member = cluster == c
        np.testing.assert_allclose(
            softmax(found[:, member]), softmax(frozen[:, member]), rtol=0, atol=2e-6
        )
    first = [
        np.stack([softmax(x)[:, cluster == c].sum(1) for c in np.unique(cluster)])
        for x in (found, frozen)
    ]
    assert np.abs(first[0] - first[1]).max() > 0.02


def test_only_the_head_has_moved(trained: SimpleNamespace) -> None:
    after = trained.setup.policy.state_dict()
    moved = {name for name in after if not torch.equal(after[name], trained.before[name])}
    parts = {name.split(".")[2] for name in moved}
    assert parts == {"head", "table", "bias"}


def test_training_starts_from_the_reward_model(trained: SimpleNamespace) -> None:
    data = trained.data
    setup = build_setup(trained.config, data, trained.model, SINGLE_PROCESS, Progress())
    context = contexts_of(data).context
    wanted = KAPPA * reward_logits(trained.model.towers, context, data.items)
    policy = setup.policy.eval()
    np.testing.assert_allclose(
        softmax(logits(policy, context, data.items)), softmax(wanted), rtol=0, atol=2e-6
    )


def test_cluster_weights_by_enumeration(trained: SimpleNamespace) -> None:
    data, setup = trained.data, trained.setup
    assert isinstance(setup.step, ReplicatedStep)
    weights = setup.step.trained.cluster_weights
    assert isinstance(weights, LoggedClusterWeights)
    rows, policy = contexts_of(data), setup.policy.eval()
    cluster = clusters_of(trained)
    pi = softmax(logits(policy, rows.context, data.items))
    logged = cluster[rows.action]
    first = np.array([pi[i, cluster == c].sum() for i, c in enumerate(logged)])
    context = to_tensors(rows.context)
    for fold in (0, 1):
        terms = policy.terms(
            policy.embed_contexts(context),
            policy.embed_items(data.items),
            torch.from_numpy(rows.action),
        )
        found = weights(Step(None, rows, fold), context, terms)  # type: ignore[arg-type]
        assert not found.requires_grad
        with torch.no_grad():
            logging = softmax(weights._logging[fold](context)[0].double().numpy())
        # Where the cluster of the i-th item stands among the model's outputs.
        place = weights._cluster.numpy()[rows.action]
        assert len(set(zip(place, logged, strict=True))) == len(set(logged)) == len(set(place))
        wanted = np.log(first) - np.log(logging[np.arange(len(rows)), place])
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6, atol=2e-5)


def test_stored_and_loaded(trained: SimpleNamespace, tmp_path: Path) -> None:
    data, policy = trained.data, trained.setup.policy.eval()
    save_policy(tmp_path / "policy", policy, {})
    loaded, _ = load_policy(tmp_path / "policy")
    context = contexts_of(data).context
    np.testing.assert_array_equal(
        logits(loaded, context, data.items), logits(policy, context, data.items)
    )
    assert bodies(loaded)[1].num_clusters == bodies(policy)[1].num_clusters


def test_a_new_item_has_its_cluster_from_its_features(trained: SimpleNamespace) -> None:
    """With a genre that training did not know an item has the frozen logit alone; by centroids it
    has the row of the nearest."""
    data, policy = trained.data, trained.setup.policy.eval()
    table = data.catalogue.table(0, 3)
    source = next(s for s in data.catalogue.schema.features if s.name == "genre").source
    place = table.column_names.index(source)
    strange = table.set_column(place, source, pa.array(["never seen"] * 3))
    items = ItemFeatures(data.item_encoding.encode(strange), 3)
    context = contexts_of(data).context
    head = logits(policy, context, items) - KAPPA * reward_logits(
        trained.model.towers, context, items
    )
    contexts, body = bodies(policy)
    assert body.bias is not None
    with torch.no_grad():
        u = contexts.head(to_tensors(context))[0].double()
        rows = (u @ body.table.weight.double().T + body.bias.weight.double()[:, 0]).numpy()
    if trained.clusters == "genre":
        np.testing.assert_allclose(head, 0.0, atol=1e-5)
    else:
        _, cluster = body.frozen(items.slice(0, 3))
        np.testing.assert_allclose(head, rows[:, cluster.numpy()], atol=1e-5)


def test_its_export_finds_its_best_items(simulated: Path, tmp_path: Path) -> None:
    """By the Retriever and by the traced context tower, which know nothing of stages."""
    run = config_of(simulated, tmp_path, "genre", "training.epochs=2")
    train_run(run)
    options = ExportOptions(index=None, onnx=False, contexts=20, kept=12)
    folder = export_run(run.run_directory, options)
    manifest = read_manifest(folder)
    assert manifest["context_tower"]["reason"] is None
    assert manifest["vectors"]["dim"] == 2 * 4 + 4 + 1
    policy, _ = load_policy(run.run_directory / "policy")
    contexts = ParquetLog.open(simulated / "test").read_row_group(0).slice(0, 30)
    data = open_data(run, Progress())
    score = logits(policy, policy.context_encoding.encode(contexts), data.items)
    found = Retriever.open(folder).search(contexts, 5)
    np.testing.assert_allclose(
        np.stack(found.score), np.sort(score)[:, ::-1][:, :5], rtol=1e-4, atol=1e-4
    )


def weights_of(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "policy" / "policy.safetensors")


def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(
    simulated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("training.epochs=2", "training.weight_average=0.4")
    whole = config_of(simulated, tmp_path / "whole", 4, *more)
    train_run(whole)
    cut = config_of(simulated, tmp_path / "cut", 4, *more, EVERY_STEP)
    save, calls = CheckpointStore.save, itertools.count()

    def killed(self: CheckpointStore, *arguments: Any) -> None:
        save(self, *arguments)
        if next(calls) == 25:
            raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointStore, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        train_run(cut)
    monkeypatch.undo()
    assert not (cut.run_directory / "policy").exists()
    train_run(cut, resume=True)
    one, two = weights_of(whole.run_directory), weights_of(cut.run_directory)
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["reward_model.kind=dense"], "set reward_model.kind=factored"),
        (["reward_model.kind=none"], "set reward_model.kind=factored"),
        (["training.strategy=item_sharded"], "set training.strategy=replicated"),
        (["training.terms=sampled"], "set training.terms=exact"),
        (["training.precision=bfloat16"], "set training.precision=float32"),
        (
            ["training.warm_start=somewhere"],
            "unset training.warm_start and training",
        ),
        (
            ["training.initialization=uniform"],
            "unset training.warm_start and training",
        ),
        (["training.initial_temperature=3"], "training.initial_temperature"),
        (["policy.learn_temperature=true"], "policy.learn_temperature and"),
        (["policy.temperature=0.5"], "leave policy.temperature at 1"),
        (["objective.entropy=0.1"], "leave objective.kl, imitation and entropy at 0"),
        (["objective.arguments.clusters=gerne"], "'gerne' is not a category.*it has genre"),
        (["objective.arguments.clusters=price"], "'price' is not a category.*it has genre"),
        (["objective.arguments.clusters=6000"], "6,000 clusters, at most 5,000"),
    ],
)
def test_what_it_cannot_do_is_refused_before_anything_is_fitted(
    simulated: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "somewhere").mkdir()
    (tmp_path / "somewhere" / "policy.json").touch()
    config = config_of(simulated, tmp_path, 4, *overrides)
    with pytest.raises(ConfigError, match=message):
        train_run(config)
    assert not (config.run_directory / "reward_model").exists()


GROUPS, PER_GROUP, LOG = 4, 6, 3000


def grouped_world(rows: int, seed: int) -> tuple[PreparedData, np.ndarray, np.ndarray]:
    """Which two of four groups are liked depends on the sign of x_1 x_2, which a linear reward
    model cannot see; which item of a group, on its quality, which it can. The log takes group g
    with probability (g + 1) / 10, whatever the context, and an item of it evenly.

    Returns:
        data; (rows, 2) contexts; (items, 2) quality and group.
    """
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(GROUPS), PER_GROUP)
    quality = np.tile(np.linspace(-1.0, 1.0, PER_GROUP), GROUPS)
    x = rng.uniform(-1.0, 1.0, (rows, 2))
    share = (group + 1) / 10.0 / PER_GROUP
    action = rng.choice(len(group), rows, p=share)
    reward = rng.uniform(size=rows) < expected(x, quality, group)[np.arange(rows), action]
    log = pa.table(
        {
            "x": pa.array(list(x.astype(np.float32)), type=pa.list_(pa.float32(), 2)),
            "action": action,
            "reward": reward.astype(np.float64),
            "pscore": share[action],
        }
    )
    log_schema = LogSchema(
        action="action",
        reward="reward",
        pscore="pscore",
        context=(FeatureSpec(name="x", kind="vector"),),
    )
    catalogue = Catalogue.from_table(
        pa.table(
            {
                "item_id": np.arange(len(group)),
                "quality": quality,
                "group": [f"g{g}" for g in group],
            }
        ),
        CatalogueSchema(
            item_id="item_id",
            features=(
                FeatureSpec(name="quality", kind="numeric"),
                FeatureSpec(name="group", kind="category"),
            ),
        ),
    )
    data = prepare(TableLog(log, log_schema), None, catalogue, Progress())
    return data, x, np.stack([quality, group], axis=1)


def expected(x: np.ndarray, quality: np.ndarray, group: np.ndarray) -> np.ndarray:
    """(n, items) P(reward = 1): .1 to .3 by quality, and .5 more in a liked group."""
    liked = (x[:, :1] * x[:, 1:] > 0.0) == (group % 2 == 0)[None]
    probability: np.ndarray = 0.2 + 0.1 * quality + 0.5 * liked
    return probability


def grouped_setup(data: PreparedData) -> TrainingSetup:
    linear = {"hidden_layer_sizes": [], "unknown_rate": 0.0}
    config = parse_config(
        {
            "name": "x",
            "seed": 1,
            "data": {"train": "memory", "catalogue": "memory"},
            "policy": {"embedding_dim": 4, "context_tower": {"hidden_layer_sizes": [32]}},
            "reward_model": {
                "kind": "factored",
                "embedding_dim": 4,
                "tower": linear,
                "folds": 2,
                "epochs": 20,
                "batch_size": 100,
                "learning_rate": 0.01,
            },
            "objective": {
                "name": "potec",
                "arguments": {"clusters": "group", "inverse_temperature": 5.0},
            },
            "training": {
                "epochs": 12,
                "batch_size": 100,
                "learning_rate": 0.02,
                "log_every_steps": None,
                "measure_terms": False,
            },
        }
    )
    model = obtain_reward_model(config.reward_model, data, config.seed, Progress())
    return build_setup(config, data, model, SINGLE_PROCESS, Progress())


def test_learns_what_the_reward_model_misses() -> None:
    """The best policy is worth .8, a greedy one over this reward model .55, as much as any policy
    that cannot see which groups are liked."""
    data, _, _ = grouped_world(LOG, 0)
    fresh, x, items = grouped_world(2000, 1)
    assert isinstance(fresh.train, TableLog)
    setup = grouped_setup(data)
    truth = expected(x, items[:, 0], items[:, 1])
    context = data.context_encoding.encode(fresh.train.table)
    model = setup.step.reward_model
    assert isinstance(model, FactoredRewardModel)
    best = reward_logits(model.towers, context, data.items).argmax(1)
    greedy = truth[np.arange(len(x)), best].mean()
    assert 0.5 < greedy < 0.6
    setup.trainer().fit()
    learned = (softmax(logits(setup.policy, context, data.items)) * truth).sum(1).mean()
    assert learned > greedy + 0.12


def test_the_logging_model_finds_the_clusters_shares() -> None:
    """A log that takes groups whatever the context: shares .1 to .4, learned within .05 on average,
    and each fold's model from the rows of the other fold."""
    data, _, _ = grouped_world(LOG, 0)
    setup = grouped_setup(data)
    assert isinstance(setup.step, ReplicatedStep)
    weights = setup.step.trained.cluster_weights
    assert isinstance(weights, LoggedClusterWeights)
    context = to_tensors(contexts_of(data, 500).context)
    cluster = weights._cluster.numpy()
    assert len(weights._logging) == 2
    for tower in weights._logging:
        with torch.no_grad():
            share = softmax(tower(context)[0].double().numpy())
        for g in range(GROUPS):
            found = share[:, cluster[g * PER_GROUP]]
            assert np.abs(found - (g + 1) / 10.0).mean() < 0.05
