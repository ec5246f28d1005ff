"""Selectors: known answers, invariances, bookkeeping and refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest

from offtower.errors import OfftowerError
from offtower.evaluation import estimators as e
from offtower.evaluation.rows import EvaluationRows
from offtower.evaluation.selection import (
    Candidate,
    NetworkOptions,
    SelectionLog,
    SelectionResult,
    compare_selectors,
    default_candidates,
    select_estimator,
)
from offtower.evaluation.selection.exact import fit_pooled
from offtower.evaluation.selection.pasif import PseudoProblem, _squared_errors, pseudo_problem

from .selection_worlds import World, candidates

ALL = ("paired", "pasif", "heuristic", "ocv", "slope")


class Rewards:
    """Rewards that remember which rows were read."""

    def __init__(self, n: int, seen: list[np.ndarray]) -> None:
        self.values, self.seen = np.arange(float(n)), seen

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        self.seen.append(index)
        return self.values[index]


class Recorder:
    """A problem that remembers which rows the candidates and the proxy truth were given."""

    def __init__(self, n: int) -> None:
        self.truth: list[np.ndarray] = []
        self.shown: list[np.ndarray] = []
        self.reward = Rewards(n, self.truth)

    def values(self, candidates: list[Candidate], index: np.ndarray) -> np.ndarray:
        self.shown.append(index)
        return np.zeros(len(candidates))


# ---- the pseudo problem -----------------------------------------------------------------------


@pytest.mark.parametrize("fit", ["exact", "network"])
def test_pseudo_problem_has_the_pseudo_target_value(fit: str) -> None:
    """Every (x, a) once, summed with pi_b: IPS, DM and DR on one part are the other's value."""
    w = World(0, n=30)
    rows, items = np.repeat(np.arange(30), 6), np.tile(np.arange(6), 30)
    log = SelectionLog.from_policies(
        items,
        w.q[rows, items],
        w.behavior[rows],
        w.target[rows],
        {"true": w.q[rows], "wrong": 1.0 - w.q[rows]},
        context=w.context[rows],
        item_features=w.item_features,
    )
    network = NetworkOptions(epochs=40, hidden=16) if fit == "network" else None
    pseudo = pseudo_problem(log, share=0.2, network=network)
    mass = w.behavior[rows, items]
    truth = np.average(log.problem.reward, weights=mass * pseudo.rho)
    rest = mass * (1.0 - pseudo.rho)
    weight, q = pseudo.problem.weight, log.problem.reward
    assert np.average(weight * q, weights=rest) == pytest.approx(truth, rel=1e-9)
    assert np.average(weight, weights=rest) == pytest.approx(1.0, rel=1e-9)
    for name, model in pseudo.problem.models.items():
        dr = np.average(weight * (q - model.action_reward) + model.expected_reward, weights=rest)
        assert dr == pytest.approx(truth, rel=1e-9), name
    dm = np.average(pseudo.problem.models["true"].expected_reward, weights=rest)
    assert dm == pytest.approx(truth, rel=1e-9)


def test_exact_pseudo_weights_imitate_the_real_ones() -> None:
    log = World(1).log()
    pseudo = pseudo_problem(log, share=0.2)
    assert np.corrcoef(pseudo.problem.weight, log.problem.weight)[0, 1] > 0.99
    assert pseudo.weight_error < 0.1 * np.mean((log.problem.weight - 1.0) ** 2)


def test_draws_and_dense_policies_agree() -> None:
    w = World(2, n=400)
    rng = np.random.default_rng(0)
    draws = (rng.random((400, 800, 1)) > w.behavior.cumsum(axis=1)[:, None, :-1]).sum(axis=2)
    ratio = w.target / w.behavior
    rows = np.arange(400)
    dense = w.log({"true": w.q})
    sampled = SelectionLog.from_draws(
        dense.problem.weight,
        w.reward,
        np.take_along_axis(ratio, draws, axis=1),
        {
            "true": (
                w.q[rows, w.action],
                (w.target * w.q).sum(axis=1),
                np.take_along_axis(w.q, draws, axis=1),
            )
        },
    )
    a, b = pseudo_problem(dense, share=0.2), pseudo_problem(sampled, share=0.2)
    np.testing.assert_allclose(a.rho, b.rho, atol=0.05)
    np.testing.assert_allclose(
        a.problem.models["true"].expected_reward,
        b.problem.models["true"].expected_reward,
        atol=0.06,
    )


def test_no_row_is_on_both_sides() -> None:
    recorder = Recorder(300)
    pseudo = PseudoProblem(np.full(300, 0.3), recorder, 0.0)
    _squared_errors(pseudo, [Candidate("a", None)], 20, seed=0)
    assert len(recorder.truth) == len(recorder.shown) == 20
    for truth, shown in zip(recorder.truth, recorder.shown, strict=True):
        assert np.intersect1d(truth, shown).size == 0
        assert truth.size + shown.size == 300
        assert np.unique(shown).size == shown.size


# ---- known answers ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["pasif", "ocv", "paired"])
def test_perfect_reward_model_puts_dm_first(method: str) -> None:
    """Over 20 logs DM is first or tied in most, and its mean place is the best of all."""
    places: dict[str, list[int]] = {}
    for seed in range(20):
        w = World(seed)
        log = w.log({"true": w.q}, independent_models=frozenset({"true"}))
        result = select_estimator(log, candidates("true"), method=method)
        for place, score in enumerate(result.ranking):
            places.setdefault(score.name, []).append(place)
    mean = {name: np.mean(p) for name, p in places.items()}
    assert min(mean, key=lambda name: mean[name]) == "DM[true]", mean


@pytest.mark.parametrize("method", ALL)
def test_identical_policies_and_a_zero_model_put_dm_last(method: str) -> None:
    for seed in range(3):
        w = World(seed, logging=(2.0, 2.0), target_beta=2.0)
        log = w.log({"zero": np.zeros_like(w.q)})
        if method == "pasif":
            np.testing.assert_allclose(pseudo_problem(log, share=0.2).rho, 0.2, atol=1e-12)
        result = select_estimator(log, candidates("zero"), method=method)
        assert result.position("DM[zero]") == len(result.ranking) - 1


@pytest.mark.parametrize("method", ALL)
def test_renumbering_items_changes_nothing(method: str) -> None:
    w = World(4)
    noisy = np.clip(w.q + 0.2, 0.0, 1.0)
    new = np.random.default_rng(1).permutation(6)
    place = np.argsort(new)
    renumbered = w.log(
        {"m": noisy[:, new]},
        action=place[w.action],
        behavior=w.behavior[:, new],
        target=w.target[:, new],
        policies=w.policies[:, :, new],
        item_features=w.item_features[new],
    )
    first = select_estimator(w.log({"m": noisy}), candidates("m"), method=method)
    second = select_estimator(renumbered, candidates("m"), method=method)
    assert [s.name for s in first.ranking] == [s.name for s in second.ranking]
    np.testing.assert_allclose(
        [s.mse for s in first.ranking], [s.mse for s in second.ranking], rtol=1e-8
    )


def test_a_badly_biased_model_is_seen_by_every_adaptive_selector() -> None:
    w = World(5)
    log = w.log({"bad": np.full_like(w.q, 0.2)})
    for method in ("paired", "pasif", "ocv", "slope"):
        result = select_estimator(log, candidates("bad"), method=method)
        assert result.position("DM[bad]") == len(result.ranking) - 1, method


def test_proxy_truth_variance_is_subtracted() -> None:
    """With identical policies IPS is a mean of 0.8 n rows: its pseudo mse is their variance."""
    total = []
    for seed in range(60):
        w = World(seed, n=400, logging=(0.0, 0.0), target_beta=0.0)
        result = select_estimator(
            w.log(), [Candidate("IPS", e.IPS())], method="pasif", repetitions=20
        )
        total.append(result.best.mse / (w.reward.var() / (0.8 * 400)))
    mean, error = np.mean(total), np.std(total) / np.sqrt(60)
    assert abs(mean - 1.0) < 4.0 * error and error < 0.5  # without it: 1 + 0.8 / 0.2 = 5


# ---- modes, bookkeeping, refusals -------------------------------------------------------------


def test_propensities_only_pool_the_multiplier_and_skip_models() -> None:
    w = World(8)
    dense = w.log({"m": w.q})
    log = SelectionLog.from_propensities(
        dense.problem.weight,
        w.reward,
        {"m": (w.q[np.arange(w.n), w.action], (w.target * w.q).sum(axis=1))},
    )
    result = select_estimator(log, candidates("m"), method="pasif")
    assert {s.name for s in result.ranking} == {"IPS", "SNIPS"}
    assert set(result.skipped) == {"DM[m]", "DR[m]", "SNDR[m]"}
    assert any("pooled" in note for note in result.notes)
    np.testing.assert_array_equal(
        pseudo_problem(log, share=0.2).rho, fit_pooled(dense.problem.weight, 0.2)
    )
    assert len(select_estimator(log, candidates("m")).ranking) == 5


def test_network_fit_runs_through_the_selector() -> None:
    w = World(9, n=300)
    result = select_estimator(
        w.log({"m": w.q}),
        candidates("m"),
        method="pasif",
        network=NetworkOptions(hidden=8, epochs=20, penalties=(1.0, 10.0)),
        repetitions=4,
    )
    assert result.details["importance_fit"] == "network" and len(result.ranking) == 5
    assert any("lambda" in note for note in result.notes)


def test_heuristic_ignores_the_target() -> None:
    w = World(10)
    first = select_estimator(w.log({"m": w.q}), candidates("m"), method="heuristic")
    other = w.log({"m": w.q}, target=np.full_like(w.target, 1 / 6))
    second = select_estimator(other, candidates("m"), method="heuristic")
    assert [s.mse for s in first.ranking] == [s.mse for s in second.ranking]
    assert [s.value for s in first.ranking] != [s.value for s in second.ranking]


@pytest.mark.parametrize("method", ALL)
def test_seeded_and_json_able(method: str) -> None:
    log = World(11, n=500).log({"m": np.full((500, 6), 0.5)})
    first = select_estimator(log, candidates("m"), method=method)
    again = select_estimator(log, candidates("m"), method=method)
    assert first.to_dict() == again.to_dict()
    text = json.dumps(first.to_dict(), allow_nan=False)
    assert json.loads(text)["best"] == first.best.name
    assert first.best.margin == 0.0 and isinstance(first, SelectionResult)


def test_default_candidates_are_tuned_and_rankable() -> None:
    w = World(13)
    log = w.log({"a": np.clip(w.q + 0.1, 0, 1), "b": np.full_like(w.q, 0.5)})
    pool = default_candidates(log.problem)
    names = [c.name for c in pool]
    assert len(names) == len(set(names)) == 5 + 7 * 2
    assert {"IPS", "LogSmoothing", "DR[a]", "DRos[b]", "SwitchDR[b]"} <= set(names)
    comparison = compare_selectors(log, pool)
    assert set(comparison.results) == set(ALL)


def test_refusals() -> None:
    log = World(14, n=200).log()
    with pytest.raises(OfftowerError, match="unknown selection method"):
        select_estimator(log, candidates(), method="oracle")
    with pytest.raises(OfftowerError, match="at least one"):
        select_estimator(log, [])
    with pytest.raises(OfftowerError, match="unique"):
        select_estimator(log, [Candidate("a", e.IPS()), Candidate("a", e.SNIPS())])
    with pytest.raises(OfftowerError, match="reward model"):
        select_estimator(log, candidates("m"))
    with pytest.raises(OfftowerError, match="consistent estimator"):
        select_estimator(log, [Candidate("c", e.ClippedIPS(max_weight=2.0))])
    with pytest.raises(OfftowerError, match="from_policies"):
        bare = SelectionLog.from_propensities(log.problem.weight, log.problem.reward)
        select_estimator(bare, candidates(), method="pasif", network=NetworkOptions())
    for share in (0.0, 1.0):
        with pytest.raises(OfftowerError, match="share"):
            select_estimator(log, candidates(), method="pasif", share=share)
    with pytest.raises(OfftowerError, match="repetitions"):
        select_estimator(log, candidates(), method="pasif", repetitions=1)


def test_a_logged_item_without_behavior_is_refused() -> None:
    with pytest.raises(OfftowerError, match="row 1"):
        SelectionLog.from_policies(
            [0, 0], [1.0, 0.0], [[1.0, 0.0], [0.0, 1.0]], [[0.5, 0.5], [0.5, 0.5]]
        )


def test_heuristic_with_three_policies_uses_the_mixture_of_the_others() -> None:
    """Rewards without noise that depend on the item only: IPS on the mixture is nearly right."""
    rng = np.random.default_rng(0)
    n = 9000
    policies = np.stack([np.tile(p, (n, 1)) for p in ([0.6, 0.4], [0.3, 0.7], [0.5, 0.5])])
    row_policy = np.arange(n) % 3
    action = (rng.random(n) > policies[row_policy, np.arange(n), 0]).astype(int)
    log = SelectionLog.from_policies(
        action,
        1.0 + action,
        policies.mean(axis=0),
        policies[0],
        {"wrong": np.full((n, 2), 3.0)},
        row_policy=row_policy,
        policies=policies,
    )
    result = select_estimator(log, candidates("wrong"), method="heuristic")
    scores = {s.name: s.mse for s in result.ranking}
    assert abs(scores["SNIPS"]) < 1e-3 and scores["DM[wrong]"] > 1.0


def test_negative_rewards_leave_logarithmic_smoothing_out() -> None:
    w = World(15, n=300)
    log = w.log(reward=w.reward - 0.5)
    assert "LogSmoothing" not in [c.name for c in default_candidates(log.problem)]


def test_float32_draws_are_accepted_and_bad_shapes_refused() -> None:
    rng = np.random.default_rng(0)
    weight, reward = rng.lognormal(size=50), rng.random(50)
    draws = rng.lognormal(size=(50, 120)).astype(np.float32)
    log = SelectionLog.from_draws(weight, reward, draws)
    assert pseudo_problem(log, share=0.2).rho.shape == (50,)
    with pytest.raises(OfftowerError, match="draw_weight"):
        SelectionLog.from_draws(weight, reward, draws[:40])
    with pytest.raises(OfftowerError, match="draws: shape"):
        SelectionLog.from_draws(weight, reward, draws, {"m": (reward, reward, draws[:, :5])})
    with pytest.raises(OfftowerError, match="draw"):
        few = SelectionLog.from_draws(weight, reward, draws[:, :20])
        select_estimator(few, candidates(), method="pasif")


def test_rows_of_several_reward_models_make_a_log() -> None:
    log = World(16, n=200).log({"a": np.full((200, 6), 0.4), "b": np.full((200, 6), 0.6)})
    rows = {name: log.problem.rows(name) for name in ("a", "b")}
    again = SelectionLog.from_rows(rows)
    pool = candidates("a", "b")
    assert (
        select_estimator(again, pool, method="paired").to_dict()
        == select_estimator(log, pool, method="paired").to_dict()
    )
    bare = SelectionLog.from_rows(log.problem.rows(None))
    assert len(select_estimator(bare, candidates(), method="pasif").ranking) == 2
    other = EvaluationRows(log.problem.weight * 2.0, log.problem.reward)
    with pytest.raises(OfftowerError, match="same log"):
        SelectionLog.from_rows({"a": rows["a"], "b": other})
    with pytest.raises(OfftowerError, match="lack"):
        SelectionLog.from_rows({"a": log.problem.rows(None)})


def test_ties_of_pasif_can_be_resolved() -> None:
    w = World(17)
    log = w.log({"m": np.clip(w.q + 0.1, 0.0, 1.0)})
    pool = candidates("m")
    plain = select_estimator(log, pool, method="pasif", repetitions=10, ties="none")
    paired = select_estimator(log, pool, method="pasif", repetitions=10, ties="paired")
    tied = {plain.best.name, *plain.tied}
    assert paired.best.name in tied and {s.mse for s in paired.ranking} == {
        s.mse for s in plain.ranking
    }
    first = next(s for s in select_estimator(log, pool).ranking if s.name in tied)
    assert paired.best.name == first.name
    with pytest.raises(OfftowerError, match="ties"):
        select_estimator(log, pool, method="pasif", ties="coin")
