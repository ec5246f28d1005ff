"""The learner as a scikit-learn estimator: contract, model selection, data frames, storage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from scipy import sparse
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.utils.estimator_checks import estimator_checks_generator

from offtower import TwoTowerPolicyLearner
from offtower.checksums import read_json, write_checked_json, write_checksums
from offtower.data.simulate import ObpWorld
from offtower.errors import ConfigError, DataError, RunError, UntrustedCodeError
from offtower.learner import OffPolicyScorer, logged_feedback
from offtower.learner.feedback import counted_tokens

WORLD = ObpWorld(8, 4, 3, beta=1.0, seed=142)
TRAIN, VALIDATION, TEST = (WORLD.sample(n, s) for s, n in enumerate((600, 400, 1000), 1))
ITEMS = TRAIN["action_context"]


def small(**options: Any) -> TwoTowerPolicyLearner:
    plain = {"objective": "ips", "epochs": 2, "hidden_layer_sizes": (8,), "embedding_dim": 4}
    return TwoTowerPolicyLearner(**{**plain, **options})


def needed(feedback: dict[str, Any]) -> dict[str, Any]:
    return {k: feedback[k] for k in ("context", "action", "reward", "pscore", "action_context")}


def joined(feedback: dict[str, Any]) -> np.ndarray:
    return logged_feedback(feedback["action"], feedback["reward"], feedback["pscore"])


class OnTargets(TwoTowerPolicyLearner):
    """Makes feedback of the targets that the checks of scikit-learn pass to `fit` and `score`."""

    def fit(self, X: Any, y: Any = None, **_: Any) -> OnTargets:  # type: ignore[override]
        super().fit(X, *self._logged(y))
        return self

    def score(self, X: Any, y: Any = None, **_: Any) -> float:  # type: ignore[override]
        return super().score(X, *self._logged(y))

    @staticmethod
    def _logged(y: Any) -> tuple[Any, Any, Any]:
        if y is None:
            return None, None, None
        action = np.unique(np.asarray(y), return_inverse=True)[1].ravel() % 3
        return action, (action == 1).astype(float), np.full(len(action), 1 / 3)


def on_targets() -> OnTargets:
    return OnTargets(objective="regression", epochs=1, hidden_layer_sizes=(4,), embedding_dim=2)


NOT_APPLICABLE = {
    # As everywhere in offtower, wrong settings raise at once and not only in `fit`.
    "check_do_not_raise_errors_in_init_or_set_params",
}
CHECKS = [
    (check.func.__name__, check)
    for _, check in estimator_checks_generator(on_targets(), legacy=True, mark=None)
    if check.func.__name__ not in NOT_APPLICABLE
]


@pytest.mark.parametrize(("name", "check"), CHECKS, ids=[name for name, _ in CHECKS])
def test_checks_of_scikit_learn(name: str, check: Any) -> None:
    check(on_targets())


def test_the_checks_are_those_of_scikit_learn() -> None:
    names = {name for name, _ in CHECKS}
    assert len(CHECKS) >= 40
    assert {
        "check_estimators_nan_inf",
        "check_estimators_unfitted",
        "check_get_params_invariance",
    } <= names


def test_settings_are_parameters() -> None:
    one = small(auto={"folds": 2}, random_state=3)
    assert clone(one).get_params() == one.get_params()
    assert one.set_params(epochs=7).config.training.epochs == 7
    assert "epochs=7" in repr(one) and "random_state=3" in repr(one) and "dropout" not in repr(one)
    with pytest.raises(ConfigError, match=r"training\.epochs"):
        one.set_params(epochs=0).fit(needed(TRAIN))
    with pytest.raises(NotFittedError, match="not fitted yet"):
        small().predict(TRAIN["context"])


def test_every_form_of_feedback_fits_the_same_policy() -> None:
    x, y = TRAIN["context"], joined(TRAIN)
    forms = (
        small().fit(needed(TRAIN)),
        small().fit(x, TRAIN["action"], TRAIN["reward"], TRAIN["pscore"], action_context=ITEMS),
        small().fit(x, y, action_context=ITEMS),
        small().fit(pd.DataFrame(x, columns=list("abcd")), y, action_context=ITEMS),
        small().fit(Frame(pa.table(list(x.T), names=list("abcd"))), y, action_context=ITEMS),
    )
    wanted = forms[0].predict_proba(TEST["context"], ITEMS)
    for fitted in forms[1:]:
        frame: Any = TEST["context"]
        if hasattr(fitted, "feature_names_in_"):
            assert list(fitted.feature_names_in_) == list("abcd")
            frame = pd.DataFrame(frame, columns=list("abcd"))
        np.testing.assert_array_equal(fitted.predict_proba(frame), wanted)
    assert (forms[0].predict(TEST["context"]) == wanted[:, :, 0].argmax(1)).all()
    for frame in (
        pd.DataFrame(x, columns=list("abdc")),
        Frame(pa.table(list(x.T), names=list("abdc"))),
    ):
        with pytest.raises(DataError, match=r"columns|feature names"):
            forms[4].predict(frame)


class Frame:
    """A data frame of some library: known by the Arrow interchange alone, as polars' are."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        return self._table.__arrow_c_stream__(requested_schema)


def shop(rows: int, seed: int) -> pd.DataFrame:
    """Clicks on 4 items; item "c" is clicked in France, "a" elsewhere."""
    rng = np.random.default_rng(seed)
    country, item = rng.choice(["fr", "de", "us"], rows), rng.choice(list("abcd"), rows)
    click = (item == np.where(country == "fr", "c", "a")) & (rng.random(rows) < 0.9)
    return pd.DataFrame(
        {
            "country": country,
            "age": rng.integers(18, 80, rows),
            "item": item,
            "click": click.astype(float),
            "propensity": 0.25,
        }
    )


SCHEMA = {
    "context": [{"name": "age", "kind": "numeric"}, {"name": "country", "kind": "category"}],
    "action": "item",
    "reward": "click",
    "pscore": "propensity",
}


@pytest.mark.parametrize("kind", [pd.DataFrame, Frame])
def test_data_frames_by_the_schema(kind: Any) -> None:
    def frame(table: pd.DataFrame) -> Any:
        arrow = pa.Table.from_pandas(table, preserve_index=False)
        return table if kind is pd.DataFrame else Frame(arrow)

    learner = small(objective="regression", epochs=8, learning_rate=0.03, schema=SCHEMA)
    learner.fit(frame(shop(1200, 1)), validation=frame(shop(300, 2)))
    asked = pd.DataFrame({"age": [30, 40, 50], "country": ["fr", "de", "us"]}, index=[7, 8, 9])
    assert list(learner.predict(frame(asked))) == ["c", "a", "a"]
    assert learner.predict_proba(frame(asked)).shape == (3, 4, 1)
    found = learner.evaluate(frame(shop(2000, 3)), confidence=0.9999, intervals=("normal",))
    snips = found.policies["learner"].estimates["snips"]
    # 0.9 for the best policy, 0.225 for the logging policy; false alarms in 1e-4.
    assert snips.intervals["normal"].low > 0.4
    assert found.logging.estimate.value == pytest.approx(shop(2000, 3)["click"].mean())
    with pytest.raises(DataError, match="no column 'country', which the schema names"):
        learner.predict(frame(asked[["age"]]))


def test_items_may_be_a_data_frame() -> None:
    items = pd.DataFrame({"sku": list("abcd"), "price": [1.0, 2.0, 3.0, 4.0]})
    learner = small(
        objective="regression",
        schema=SCHEMA,
        catalogue_schema={"item_id": "sku", "features": [{"name": "price", "kind": "numeric"}]},
    ).fit(shop(400, 1), action_context=items)
    more = pd.DataFrame({"sku": list("abcde"), "price": [1.0, 2.0, 3.0, 4.0, 5.0]})
    assert learner.predict_proba(shop(3, 2), more).shape == (3, 5, 1)
    np.testing.assert_allclose(learner.predict_proba(shop(3, 2)).sum(1), 1.0)


def test_evaluation_is_that_of_the_weights() -> None:
    fitted = small().fit(needed(TRAIN))
    weight = np.exp(fitted.log_prob(TEST["context"], TEST["action"], ITEMS)) / TEST["pscore"]
    snips = (weight * TEST["reward"]).sum() / weight.sum()
    assert fitted.score(needed(TEST)) == pytest.approx(snips, rel=1e-5)
    assert fitted.score(TEST["context"], joined(TEST)) == pytest.approx(snips, rel=1e-5)
    scorer = OffPolicyScorer("ips")
    ips = (weight * TEST["reward"]).mean()
    assert scorer(fitted, TEST["context"], joined(TEST)) == pytest.approx(ips, rel=1e-5)
    bound = OffPolicyScorer("ips", lower_bound=True)(fitted, TEST["context"], joined(TEST))
    error = (weight * TEST["reward"]).std(ddof=1) / np.sqrt(len(weight))
    assert bound == pytest.approx(ips - 1.96 * error, rel=1e-3)
    with pytest.raises(DataError, match="needs the logged propensities"):
        fitted.score(TEST["context"], TEST["action"], TEST["reward"])
    with pytest.raises(DataError, match="expected the id of an item in the catalogue"):
        fitted.score(TEST["context"], TEST["action"] + 1, TEST["reward"], TEST["pscore"])


def test_model_selection_of_scikit_learn() -> None:
    grid = {"epochs": [1, 3], "learning_rate": [1e-3, 0.03]}
    search = GridSearchCV(small(), grid, scoring=OffPolicyScorer("snips"), cv=2)
    search.fit(TRAIN["context"], joined(TRAIN), action_context=ITEMS)
    scores = search.cv_results_["mean_test_score"]
    assert len(scores) == 4 and np.isfinite(scores).all() and len(set(scores)) == 4
    best = search.best_estimator_
    assert best.get_params()["epochs"] == search.best_params_["epochs"]
    # The winner, refitted on all rows, is what the same settings fit.
    again = small(**search.best_params_).fit(needed(TRAIN))
    x = TEST["context"]
    np.testing.assert_array_equal(best.predict_proba(x), again.predict_proba(x))
    plain = cross_val_score(small(epochs=1), TRAIN["context"], joined(TRAIN), cv=2)
    assert np.isfinite(plain).all()


@pytest.mark.parametrize("where", ["context", "action_context"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e39])
def test_prediction_refuses_what_fit_refuses(where: str, bad: float) -> None:
    fitted = small().fit(needed(TRAIN))
    feedback = {**needed(TEST), where: needed(TEST)[where].copy()}
    feedback[where][1, 1] = bad
    with pytest.raises(DataError):
        small().fit(feedback)
    with pytest.raises(DataError, match=r"NaN|infinity|too large"):
        fitted.predict_proba(feedback["context"], feedback["action_context"])
    with pytest.raises(DataError):
        fitted.evaluate(feedback)


@pytest.mark.parametrize("form", ["matrix", "frame", "numbers", "auto"])
def test_save_and_load(tmp_path: Path, form: str) -> None:
    x: Any = TEST["context"]
    if form == "frame":
        x = shop(5, 4)
        fitted = small(objective="regression", schema=SCHEMA).fit(shop(300, 1))
    elif form == "numbers":
        fitted = small().fit(TRAIN["context"], joined(TRAIN))
    elif form == "auto":
        fitted = small(objective="auto", auto={"epochs": 1, "folds": 2}).fit(needed(TRAIN))
    else:
        fitted = small(item_bias=True, temperature=0.5).fit(needed(TRAIN), needed(VALIDATION))
    fitted.save(tmp_path / "learner")
    loaded = TwoTowerPolicyLearner.load(tmp_path / "learner")
    np.testing.assert_array_equal(loaded.predict_proba(x), fitted.predict_proba(x))
    np.testing.assert_array_equal(loaded.predict(x), fitted.predict(x))
    kept = {**fitted.get_params(), "schema": None}
    assert {**loaded.get_params(), "schema": None} == kept
    assert [line["epoch"] for line in loaded.history_] == [
        line["epoch"] for line in fitted.history_
    ]
    files = {path.suffix for path in (tmp_path / "learner").rglob("*") if path.is_file()}
    assert files <= {".json", ".parquet", ".safetensors"}


def test_loading_refuses_code_and_damage(tmp_path: Path) -> None:
    small().fit(needed(TRAIN)).save(tmp_path / "learner")
    path = tmp_path / "learner" / "learner.json"
    content = {k: v for k, v in read_json(path).items() if k != "sha256"}
    good = json.dumps(content)
    for change in (
        {"objective": "evil.module:Objective"},
        {"reward_model": {"kind": "dense", "estimator": "evil.module:Model"}},
    ):
        content = json.loads(good)
        content["settings"] |= change
        (tmp_path / "learner" / "checksums.json").unlink()
        write_checked_json(path, content)
        write_checksums(tmp_path / "learner")
        with pytest.raises(UntrustedCodeError, match=r"evil\.module"):
            TwoTowerPolicyLearner.load(tmp_path / "learner")
    path.write_text(path.read_text().replace("evil", "kind"))
    with pytest.raises(RunError):
        TwoTowerPolicyLearner.load(tmp_path / "learner")
    with pytest.raises(RunError, match="no learner at"):
        TwoTowerPolicyLearner.load(tmp_path / "none")


def test_history_is_drawn() -> None:
    import matplotlib

    matplotlib.use("Agg")
    axes = small(epochs=3).fit(needed(TRAIN), needed(VALIDATION)).plot_history()
    (line,) = axes.get_lines()
    assert list(line.get_xdata()) == [1, 2, 3] and np.isfinite(line.get_ydata()).all()
    (held_out,) = axes.figure.axes[1].get_lines()
    assert len(held_out.get_ydata()) == 3


def test_progress_reaches_an_object() -> None:
    from offtower.progress import Progress

    tasks: list[str] = []

    class Heard(Progress):
        def start(self, task: str, total: int | None) -> None:
            tasks.append(task)

    small(progress=Heard()).fit(needed(TRAIN))
    assert any("log" in task for task in tasks)


def documents(rows: int, seed: int, columns: int = 5000) -> tuple[sparse.csr_array, dict[str, Any]]:
    """Counts of words; one of the first three words, thrice in a row, decides which item pays."""
    rng = np.random.default_rng(seed)
    word = np.column_stack([rng.integers(0, 3, rows), rng.integers(3, 60, (rows, 2))])
    shape, row = (rows, columns), np.repeat(np.arange(rows), 3)
    times = np.tile([3.0, 1.0, 1.0], rows)
    counts = sparse.coo_array((times, (row, word.ravel())), shape=shape).tocsr()
    action = rng.integers(0, 3, rows)
    reward = (action == word[:, 0]) * (rng.random(rows) < 0.9)
    return counts, {"action": action, "reward": reward, "pscore": np.full(rows, 1 / 3)}


def test_sparse_counts_are_learned_without_a_dense_matrix(tmp_path: Path) -> None:
    x, logged = documents(3000, 1)
    other, held_out = documents(2000, 2)
    assert x.max() == 3 and x.nnz <= 3 * 3000
    x.toarray = x.todense = refuse_dense  # type: ignore[method-assign]
    options: dict[str, Any] = {"objective": "regression", "epochs": 8, "learning_rate": 0.03}
    fitted = small(**options).fit(x, joined(logged))
    again = small(**options).fit({"context": x, **logged})
    pi = fitted.predict_proba(other)
    # Training is deterministic, and the dict is the same feedback.
    np.testing.assert_array_equal(again.predict_proba(other), pi)
    best = np.asarray(other[:, [0, 1, 2]].argmax(axis=1)).ravel()
    assert (pi[:, :, 0].argmax(1) == best).mean() > 0.95
    assert fitted.score(other, joined(held_out)) > 0.4
    np.testing.assert_array_equal(fitted.predict_proba(other[:20].toarray()), pi[:20])
    fitted.save(tmp_path / "learner")
    loaded = TwoTowerPolicyLearner.load(tmp_path / "learner")
    np.testing.assert_array_equal(loaded.predict_proba(other), pi)


def refuse_dense(*_: Any, **__: Any) -> None:
    raise AssertionError("made dense")


@pytest.mark.parametrize("value", [0.5, -1.0, 101.0, np.nan, np.inf])
def test_sparse_values_that_are_no_counts_are_refused(value: float) -> None:
    x, logged = documents(50, 1)
    fitted = small(epochs=1).fit(x, joined(logged))
    x.data[7] = value
    for attempt in (lambda: small(epochs=1).fit(x, joined(logged)), lambda: fitted.predict(x)):
        with pytest.raises(DataError, match=r"counts|NaN|infinity"):
            attempt()
    dense = small(epochs=1).fit(needed(TRAIN))
    with pytest.raises(DataError, match="fitted on a dense matrix"):
        dense.predict(sparse.csr_array(TEST["context"]))


def test_counts_are_repeated_columns() -> None:
    matrix = sparse.csr_array(np.array([[0, 2, 0, 1], [0, 0, 0, 0], [1, 0, 0, 3]]))
    assert counted_tokens(matrix).to_pylist() == [[1, 1, 3], [], [0, 3, 3, 3]]
    assert counted_tokens(matrix.tocoo()).to_pylist() == counted_tokens(matrix).to_pylist()
