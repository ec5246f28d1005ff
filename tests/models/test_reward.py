"""Reward models: cross-fitting without leaks, both kinds, and what is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from offtower.config import RewardModelConfig
from offtower.crossfit.fold_towers import reward_folds
from offtower.crossfit.reward_model import obtain_reward_model
from offtower.data import Catalogue, FeatureSpec, LogSchema, TableLog
from offtower.data.reader import scan
from offtower.data.rows import EncodedRows
from offtower.errors import ConfigError
from offtower.models.reward.base import RewardModel
from offtower.models.reward.dense import check_size
from offtower.ops import DenseReward, FactoredReward, policy_terms
from offtower.prepare import PreparedData, prepare
from offtower.progress import Progress

ITEMS, SEED = 5, 3


class NearestRow:
    """A regressor that remembers its training rows to the letter: any leak shows at once.

    Predicts the reward of the training pair that equals the asked one, and -1 where none does.
    """

    def get_params(self) -> dict[str, Any]:
        return {}

    def fit(self, pairs: np.ndarray, reward: np.ndarray) -> NearestRow:
        self.known = {pair.tobytes(): r for pair, r in zip(pairs, reward, strict=True)}
        return self

    def predict(self, pairs: np.ndarray) -> np.ndarray:
        return np.array([self.known.get(pair.tobytes(), -1.0) for pair in pairs])


def data(n: int = 300, *, users: bool = False, binary: bool = True) -> PreparedData:
    rng = np.random.default_rng(0)
    x = rng.normal(size=n)
    action = rng.integers(0, ITEMS, n)
    q = 1 / (1 + np.exp(-(2 * x * (action - 2))))
    reward = (rng.random(n) < q).astype(float) if binary else q
    columns: dict[str, Any] = {
        "x": x,
        "action": action,
        "reward": reward,
        "pscore": np.full(n, 1 / ITEMS),
        "user": np.arange(n) // 3,
    }
    schema = LogSchema(
        context=(FeatureSpec(name="x", kind="numeric"),), user_id="user" if users else None
    )
    items = np.eye(ITEMS, dtype=np.float32)
    catalogue = Catalogue.from_arrays(np.arange(ITEMS), {"v": items})
    return prepare(TableLog(pa.table(columns), schema), None, catalogue, Progress())


def rows_of(prepared: PreparedData) -> EncodedRows:
    return next(scan(prepared.train, prepared.catalogue, prepared.context_encoding, 10_000))


def fit(prepared: PreparedData, directory: Path | None = None, **config: Any) -> RewardModel:
    model = obtain_reward_model(RewardModelConfig(**config), prepared, SEED, Progress(), directory)
    assert model is not None
    return model


@pytest.mark.parametrize("users", [False, True])
def test_no_row_is_predicted_by_a_model_that_saw_it(users: bool) -> None:
    prepared = data(users=users)
    model = fit(prepared, kind="dense", estimator=f"{__name__}:NearestRow", folds=3)
    rows = rows_of(prepared)
    folds = reward_folds(rows, 3, SEED)
    for fold in range(3):
        part = rows.take(np.flatnonzero(folds == fold))
        q = model.for_training_rows(part, fold)
        assert isinstance(q, DenseReward)
        assert (q.values == -1.0).all()
    if users:  # All rows of a user lie in one fold.
        for user in np.unique(rows.user_id):
            assert len(np.unique(folds[rows.user_id == user])) == 1


def test_one_fold_reads_its_own_rows() -> None:
    prepared = data()
    model = fit(prepared, kind="dense", estimator=f"{__name__}:NearestRow", folds=1)
    rows = rows_of(prepared)
    q = model.for_training_rows(rows, 0)
    assert isinstance(q, DenseReward)
    logged = q.values[torch.arange(len(rows)), torch.from_numpy(rows.action)]
    np.testing.assert_array_equal(logged.numpy(), rows.reward)


@pytest.mark.parametrize("kind", ["dense", "factored"])
def test_models_learn_the_reward(kind: str) -> None:
    """Mean squared error to the true q below half of the best constant's (fixed seed)."""
    prepared = data(4000)
    model = fit(prepared, kind=kind, folds=2, epochs=15, batch_size=64, learning_rate=0.01)
    rows = rows_of(prepared)
    x = np.asarray(prepared.train.read_row_group(0).column("x"))
    q = model.for_new_rows(rows)
    u, v = torch.zeros(len(rows), 2), torch.zeros(ITEMS, 2)
    predicted = np.empty((len(rows), ITEMS))
    for a in range(ITEMS):
        terms = policy_terms(u, v, torch.full((len(rows),), a), reward_model=q)
        assert terms.action_reward is not None
        predicted[:, a] = terms.action_reward.numpy()
    true = 1 / (1 + np.exp(-2 * x[:, None] * (np.arange(ITEMS) - 2)))
    assert ((predicted - true) ** 2).mean() < 0.5 * true.var()


@pytest.mark.parametrize("binary", [False, True])
def test_link_follows_the_rewards(binary: bool) -> None:
    prepared = data(binary=binary)
    model = fit(prepared, kind="factored", folds=2, epochs=1)
    q = model.for_training_rows(rows_of(prepared).take(np.arange(4)), 0)
    assert isinstance(q, FactoredReward)
    assert q.link == ("sigmoid" if binary else "identity")


def test_mean_of_folds_is_factored() -> None:
    prepared = data()
    model = fit(prepared, kind="factored", folds=3, epochs=2, link="identity", embedding_dim=4)
    rows = rows_of(prepared).take(np.arange(7))

    def values(q: Any) -> torch.Tensor:
        return q.context @ q.item.T + q.item_bias

    mean = torch.stack([values(model.for_training_rows(rows, f)) for f in range(3)]).mean(0)
    torch.testing.assert_close(values(model.for_new_rows(rows)), mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["dense", "factored"])
def test_restored_models_give_the_same_bits(kind: str, tmp_path: Path) -> None:
    prepared = data()
    first = fit(prepared, tmp_path / "reward", kind=kind, folds=2, epochs=2)
    assert not list(tmp_path.rglob("*.pkl"))
    again = fit(prepared, tmp_path / "reward", kind=kind, folds=2, epochs=2)
    fresh = fit(prepared, None, kind=kind, folds=2, epochs=2)
    rows = rows_of(prepared)
    part = rows.take(np.flatnonzero(reward_folds(rows, 2, SEED) == 1))
    for other in (again, fresh):
        one, two = vars(first.for_training_rows(part, 1)), vars(other.for_training_rows(part, 1))
        for name, value in one.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, two[name]), name


def test_classifiers_give_probabilities() -> None:
    """Not labels, which are what a classifier's `predict` gives."""
    prepared = data(1000)
    model = fit(prepared, kind="dense", estimator="sklearn.linear_model:LogisticRegression")
    q = model.for_new_rows(rows_of(prepared))
    assert isinstance(q, DenseReward)
    assert q.values.min() > 0 and q.values.max() < 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"estimator": "sklearn.linear_model:Nothing"}, "has no 'Nothing'"),
        ({"estimator": "sklearn.linear_model:Ridge", "arguments": {"alfa": 1}}, "do not fit"),
    ],
)
def test_mistakes_are_explained(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit(data(), kind="dense", **config)


def test_a_dense_model_of_a_large_catalogue_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"reward_model\.kind=factored"):
        check_size(1_000_000, 1_000_000)
